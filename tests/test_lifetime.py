"""Nothing of this package keeps a model alive: not a cache, a reading, a hook, a graph, nor what a profile has seen.

On a GPU the next model would have to share the device with it.
"""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from mmpeft_fast import LoRA, add_peft, fuse, make_method, profile, provider, unfuse
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

BATCH = tiny_batch("llama")


def built(method=None):
    model = fuse(add_peft(tiny_model("llama"), method or LoRA(r=4, alpha=8, dropout=0.3))).train()
    randomize_trainable(model)
    return model


def fused():
    model = built()
    loss_and_grads(model, BATCH)
    return model, None


def unfused():
    model = built()
    loss_and_grads(model, BATCH)
    unfuse(model)
    loss_and_grads(model, BATCH)
    return model, None


def fused_again():
    model = built()
    loss_and_grads(fuse(unfuse(model)), BATCH)
    return model, None


def with_prefix():
    model = built(make_method("prefix", num_virtual_tokens=3, projection=True))
    loss_and_grads(model, BATCH)
    return model, None


def by_torch():
    model = built()
    with provider("torch"):
        loss_and_grads(model, BATCH)
    return model, None


def reentrant():
    model = built()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    loss_and_grads(model, BATCH)
    return model, None


def checkpointed():
    model = built()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_and_grads(model, BATCH)
    return model, None


def compiled():
    model = built()
    loss_and_grads(torch.compile(model, backend="aot_eager"), BATCH)
    torch._dynamo.reset()  # the compiler's own guards and graphs
    return model, None


def without_backward():
    model = built()
    model(**BATCH)
    return model, None


def failed_in_a_layer():
    model = built()

    def fail(*_):
        raise RuntimeError("in the last layer")

    layers = model.model.layers
    handle = layers[-1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the last layer"):
        model(**BATCH)
    handle.remove()
    return model, None


def generating():
    model = built().eval()
    model.generate(BATCH["input_ids"][:1, :8], attention_mask=BATCH["attention_mask"][:1, :8], max_new_tokens=3)
    return model, None


def profiled():
    model = built()
    with profile(model) as session:
        loss_and_grads(model, BATCH)
    return model, session


def profiled_in_vain():
    model = built()
    session = profile(model)
    with pytest.raises(RuntimeError, match="of the step"), session:
        loss_and_grads(model, BATCH)
        raise RuntimeError("of the step")
    return model, session


CASES = (
    fused, unfused, fused_again, with_prefix, by_torch, reentrant, checkpointed, compiled, without_backward,
    failed_in_a_layer, generating, profiled, profiled_in_vain,
)  # fmt: skip


def parts(model: nn.Module) -> Iterator[tuple[str, object]]:
    yield "the model", model
    yield from model.named_modules()
    yield from model.named_parameters()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_model_dies_with_its_last_reference(case):
    """Also where what the step gave is kept: a case returns the model and that."""
    model, kept = case()
    watched = {name: weakref.ref(part) for name, part in parts(model)}
    del model
    gc.collect()
    alive = [name for name, part in watched.items() if part() is not None]
    assert not alive, f"alive beside {kept}: {alive[:5]}"

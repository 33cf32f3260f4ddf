"""Families whose attention may have a sliding window: fused equals unfused where sequences are longer than it."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from mmpeft_fast import add_peft, fuse, make_method
from mmpeft_fast.models import FAMILIES
from tests.closeness import assert_as_close_as_eager
from tests.test_fuse import generate
from tests.tiny_models import VOCABULARY, loss_and_grads, randomize_trainable, tiny_batch, token_id

WINDOW = 8
SETTINGS = {"lora": {"r": 4, "dropout": 0.0}, "prefix": {"num_virtual_tokens": 5}, "ia3": {}}


def windowed(family_name, method, window=WINDOW):
    """Mistral has the window in every layer, Qwen in the last one only. Method None: a plain model."""
    family = FAMILIES[family_name]
    config = family.tiny_config(VOCABULARY, token_id)
    config.num_hidden_layers, config.sliding_window = 2, window
    if family_name != "mistral":
        config.use_sliding_window = True
        config.layer_types = ["full_attention", "sliding_attention"]
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = family.model_class(config)
    if method is None:
        return model
    add_peft(model, make_method(method, **SETTINGS[method]))
    randomize_trainable(model)
    return model


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def losses_and_grads(model, batches):
    """The losses, and all gradients of each batch over the size of its truth's, as one vector each."""
    losses, grads = zip(*(loss_and_grads(model, batch) for batch in batches))
    return torch.stack(losses), [torch.cat([each[name].flatten() for name in sorted(each)]) for each in grads]


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("padding_side", [None, "right", "left"])
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_training_step(family, method, padding_side):
    """With small adapters: those of `randomize_trainable` enlarge rounding a hundred times here, and one draw of it
    then decides."""
    model = windowed(family, method).train()
    with torch.no_grad():
        for parameter in trained(model):
            parameter *= 0.3
    batches = [tiny_batch(family, padding_side=padding_side)]
    batches += [batches[0] | {"input_ids": batches[0]["input_ids"].flip(0).roll(shift, 1)} for shift in (0, 1, 2)]
    truth = losses_and_grads(copy.deepcopy(model).double(), batches)
    eager = losses_and_grads(model, batches)
    fused = losses_and_grads(fuse(model), batches)
    assert_as_close_as_eager(fused[0], eager[0], truth[0], "loss")
    sizes = [torch.linalg.vector_norm(grads) for grads in truth[1]]
    scaled = [torch.cat([grads / size for grads, size in zip(of[1], sizes)]) for of in (fused, eager, truth)]
    assert_as_close_as_eager(*scaled, "gradients")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_callers_word_on_padding_does_not_drop_the_window(family):
    model = fuse(windowed(family, "lora")).train()
    batch = tiny_batch(family)
    hinted = batch | {"right_padded": True, "supervised_capacity": 6}
    torch.testing.assert_close(model(**hinted).loss, model(**batch).loss)


def test_the_window_is_seen():
    """The tests above would pass with a window that is never looked at, were it as long as the sequences."""
    batch = tiny_batch("mistral")
    short, long = (windowed("mistral", "lora", window).train()(**batch).loss for window in (WINDOW, 512))
    assert (short - long).abs() > 1e-3


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("method", ["lora", "ia3", "prefix"])
def test_generation_beyond_the_window(family, method):
    model = windowed(family, method)
    batch = tiny_batch(family, padding_side="left")
    eager = generate(model, batch)
    fused = generate(fuse(model), batch)
    assert torch.equal(eager, fused)
    assert torch.equal(eager, generate(model, batch, use_cache=False))


def test_what_would_lose_the_window_is_not_fused():
    model = windowed("mistral", "lora")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="its window is known to transformers' flash attention alone"):
        fuse(model, strict=True)


def test_a_prefix_in_the_cache_stays_there():
    """HF PEFT's prefix falls out of the window with the tokens before it; fused, every query would see it."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    plain = windowed("mistral", None)
    model = get_peft_model(plain, config).train()
    batch = tiny_batch("mistral")
    loss, grads = loss_and_grads(model, batch)
    with pytest.warns(UserWarning, match="1 of 5 modules stay .*: PeftModelForCausalLM: the decoder's window"):
        fuse(model)
    fused_loss, fused_grads = loss_and_grads(model, batch)
    torch.testing.assert_close(fused_loss, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-3, atol=1e-6)

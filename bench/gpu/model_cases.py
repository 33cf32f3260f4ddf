"""Fused tiny models of every method against the same model unfused, loss and every gradient, on the device."""

import copy

import torch
from torch import Tensor

from bench.gpu.judge import cloned, mapped, verdict
from mmpeft_fast import add_peft, fuse, make_method
from mmpeft_fast import provider as forced
from mmpeft_fast.labels import IGNORE_INDEX

# Errors of a tiny model are a few coin flips of rounding: they are judged over several models together.
_NUM_MODELS = 3
_SMALL = {"lora": {"r": 8, "alpha": 16, "dropout": 0.0}, "adapter": {"bottleneck": 16, "dropout": 0.0}}


def compare(name: str, dtype: torch.dtype, provider: str, device: str) -> dict[str, object]:
    """A verdict on loss and gradients of the fused model; {"ok", "error", ...}."""
    from tests.tiny_models import randomize_trainable, tiny_batch, tiny_model

    family, method = name.split()
    outputs: dict[str, list[dict[str, Tensor]]] = {"fused": [], "eager": [], "truth": []}
    repeats = True
    for seed in range(_NUM_MODELS):
        model = tiny_model(family, dtype=dtype, seed=seed).train()
        model = add_peft(model, make_method(method, **_SMALL.get(method, {})))
        randomize_trainable(model)
        batch = tiny_batch(family, dtype=dtype)
        batch["labels"] = torch.where(batch["labels"] == IGNORE_INDEX, batch["input_ids"], batch["labels"])
        model, batch = model.to(device), mapped(batch, lambda tensor: tensor.to(device))
        truth_batch = mapped(batch, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
        fused = fuse(copy.deepcopy(model))
        outputs["truth"].append(_loss_and_grads(copy.deepcopy(model).double(), truth_batch))
        outputs["eager"].append(_loss_and_grads(model, batch))
        with forced(provider):
            outputs["fused"].append(_loss_and_grads(fused, cloned(batch)))
            for _ in range(2):  # the last one from tapes
                again = _loss_and_grads(fused, cloned(batch))
                repeats &= all(torch.equal(part, again[key]) for key, part in outputs["fused"][-1].items())
    got, eager, truth = (
        {key: torch.cat([result[key].flatten() for result in results]) for key in results[0]}
        for results in (outputs[which] for which in ("fused", "eager", "truth"))
    )
    # transformers takes the loss in float32 from logits in the model's dtype: its error is that of the model's dtype.
    for results in (got, eager):
        results["loss"] = results["loss"].to(dtype)
    # Not all of the library's kernels repeat (attention with a mask, the gradient of embeddings): said, not asked for.
    return {**verdict(got, eager, truth), "repeats": repeats}


def _loss_and_grads(model: torch.nn.Module, batch: dict) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {name: part.grad for name, part in model.named_parameters() if part.grad is not None}
    return {"loss": loss.detach()[None], **{name: grad.detach().clone() for name, grad in grads.items()}}

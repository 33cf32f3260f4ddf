"""The contract of every method in every family: fused equals HF PEFT, or the study's eager definition."""

import copy

import pytest
import torch

from mmpeft_fast import METHODS as ALL_METHODS
from mmpeft_fast import fuse, is_fused, unfuse
from mmpeft_fast.closeness import allowed_error, relative_error
from mmpeft_fast.peft_model import study_method
from mmpeft_fast.stored.baseline import add_baseline
from tests.closeness import assert_as_close_as_eager
from tests.tiny_models import (
    TEXT_FAMILIES,
    family_method_cases,
    judged_together,
    loss_and_grads,
    randomize_trainable,
    small_settings,
    tiny_batch,
    tiny_model,
)

METHODS = {
    "lora": ("lora", {"r": 8, "alpha": 16, "dropout": 0.0}),
    "lora-attention": ("lora", {"r": 3, "alpha": 6, "dropout": 0.0, "targets": "attention"}),
    "ia3": ("ia3", {}),
    "adapter": ("adapter", {"bottleneck": 8, "dropout": 0.0}),
    "adapter-both": ("adapter", {"bottleneck": 8, "dropout": 0.0, "targets": "both", "activation": "gelu"}),
    "adapter-parallel": ("adapter", {"bottleneck": 8, "dropout": 0.0, "placement": "parallel", "init": "kaiming"}),
    "prefix": ("prefix", {"num_virtual_tokens": 5}),
    "prefix-projection": ("prefix", {"num_virtual_tokens": 5, "projection": True}),
    "layernorm": ("layernorm", {}),
    "layernorm-simp": ("layernorm-simp", {"final": True}),
    "sharelora": ("sharelora", {"r": 4, "dropout": 0.0, "shared": "both"}),
}
METHODS |= {name: (name, small_settings(name)) for name in ALL_METHODS if name not in METHODS}
HF_PEFT_HAS = ("lora", "ia3", "layernorm", "dora", "vera")
MROPE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CASES = family_method_cases(METHODS)


def prepared(family, method, *, train_connector=False, num_layers=2):
    """A model with PEFT parameters as the stock stack sets it up, in training mode."""
    name, settings = METHODS[method]
    model = tiny_model(family, num_layers=num_layers)
    model, what = add_baseline(model, study_method(model, name, **settings), train_connector=train_connector)
    expected_hf = name.startswith(HF_PEFT_HAS) or (name == "prefix" and family not in MROPE_FAMILIES)
    assert what.startswith("HF PEFT") == expected_hf
    randomize_trainable(model)
    return model.train()


def assert_same_training_step(model, batch, *, strict=True, again=None):
    """Loss and every gradient, before and after `fuse(model, strict=strict)`, are equally close to float64.

    again: another batch for what is off by no more than chance can be (`verify.py`), which has to agree there.
    """
    truth_model, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    truth = loss_and_grads(truth_model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    eager = loss_and_grads(model, batch)
    fuse(model, strict=strict)
    fused = loss_and_grads(model, batch)
    assert_as_close_as_eager(fused[0], eager[0], truth[0], "loss")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(fused[1]) == set(eager[1]) == trained
    fused, eager, truth = (judged_together(grads) for _, grads in (fused, eager, truth))
    errors = {
        name: (relative_error(fused[name], truth[name]), allowed_error(eager[name], truth[name])) for name in truth
    }
    doubtful = [name for name, (got, allowed) in errors.items() if not got <= allowed]
    if doubtful and again is not None and all(errors[name][0] <= 2 * errors[name][1] for name in doubtful):
        wide = {k: v.double() if v.is_floating_point() else v for k, v in again.items()}
        found = [loss_and_grads(*pair)[1] for pair in ((model, again), (plain, again), (truth_model, wide))]
        fused, eager, truth = map(judged_together, found)
    for name in doubtful:
        assert_as_close_as_eager(fused[name], eager[name], truth[name], name)


@pytest.mark.parametrize("family, method", CASES)
def test_loss_and_every_gradient(family, method):
    side = "left" if method in ("ia3", "adapter", "prefix-projection") else "right"
    batch, again = (tiny_batch(family, padding_side=side, seed=seed) for seed in (1, 2))
    assert_same_training_step(prepared(family, method), batch, again=again)


@pytest.mark.parametrize(
    "family, method",
    [case for case in CASES if case[1] in ("lora", "ia3", "adapter", "prefix", "layernorm-simp")],
)
def test_with_trained_connector_and_the_other_padding(family, method):
    side = "right" if method in ("ia3", "adapter") else "left"
    model = prepared(family, method, train_connector=family not in TEXT_FAMILIES)
    assert_same_training_step(model, tiny_batch(family, padding_side=side))


@pytest.mark.parametrize("method", ["lora", "adapter", "ia3", "prefix-projection"])
def test_frozen_subsets(method):
    """Gradients of what is still trained do not depend on what else is."""
    model = prepared("qwen2_vl", method)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.requires_grad_(i % 3 == 0)
    assert 0 < sum(p.requires_grad for p in model.parameters()) < len(names)
    assert_same_training_step(model, tiny_batch("qwen2_vl"))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen_vl"])
@pytest.mark.parametrize("method", ["lora", "adapter", "prefix"])
def test_bf16(family, method):
    model = prepared(family, method)
    truth_model = copy.deepcopy(model).bfloat16().double()
    model = model.bfloat16()
    # The error of a single loss is one draw from a distribution around zero; of several, the norms compare.
    batches = [tiny_batch(family, dtype=torch.bfloat16, seed=seed) for seed in range(16)]

    def losses_and_grads(model, cast=lambda x: x):
        inputs = [{key: cast(value) for key, value in batch.items()} for batch in batches]
        with torch.no_grad():
            losses = torch.stack([model(**batch).loss for batch in inputs])
        return losses, loss_and_grads(model, inputs[0])[1]

    truth = losses_and_grads(truth_model, lambda x: x.double() if x.is_floating_point() else x)
    eager = losses_and_grads(model)
    fused = losses_and_grads(fuse(model, strict=True))
    assert_as_close_as_eager(fused[0], eager[0], truth[0], "losses")

    def flat(grads):
        return torch.cat([grads[name].double().flatten() for name in sorted(truth[1])]).to(torch.bfloat16)

    assert_as_close_as_eager(flat(fused[1]), flat(eager[1]), flat(truth[1]).double(), "all gradients")


@pytest.mark.parametrize("family, method", CASES)
def test_logits_in_eval_and_after_unfuse(family, method):
    model = prepared(family, method, num_layers=1).eval()
    batch = tiny_batch(family, padding_side="left")
    with torch.no_grad():
        eager = model(**batch)
        fused = fuse(model, strict=True)(**batch)
        assert is_fused(model)
        real = batch["attention_mask"].bool()
        assert fused.logits.shape == eager.logits.shape
        torch.testing.assert_close(fused.logits[real], eager.logits[real])
        torch.testing.assert_close(fused.loss, eager.loss)
        again = unfuse(model)(**batch)
    assert not is_fused(model)
    assert torch.equal(again.logits, eager.logits)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "prefix", "layernorm-simp"])
def test_twenty_training_steps(family, method):
    losses = {}
    for implementation in ("peft", "fused"):
        model = prepared(family, method, num_layers=1)
        if implementation == "fused":
            fuse(model, strict=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses[implementation] = []
        for step in range(20):
            batch = tiny_batch(family, batch_size=1 + step % 3)
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[implementation].append(loss.item())
    assert losses["fused"][18] < losses["fused"][0]  # the same batch
    torch.testing.assert_close(torch.tensor(losses["fused"]), torch.tensor(losses["peft"]), rtol=1e-4, atol=0)

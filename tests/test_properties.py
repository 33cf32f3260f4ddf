"""Random combinations of everything: a fused model equals the unfused one, or the combination is refused with a reason.

42 combinations by default, 504 with `make nightly`, as many of each method.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from mmpeft_fast import METHODS, add_peft, fuse, fuse_report, make_method, unfuse
from mmpeft_fast.models import FAMILIES
from mmpeft_fast.stored.baseline import add_baseline
from tests.closeness import assert_as_close_as_eager, assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "silu")


@dataclass(frozen=True)
class Case:
    family: str
    method: str
    by_peft: bool
    """HF PEFT's parameters where it has the method, not the package's own."""
    settings: tuple[tuple[str, object], ...]
    dtype: torch.dtype
    batch_size: int
    padding_side: str | None
    num_layers: int
    train_connector: bool
    frozen: int
    """Every n-th trained parameter is frozen again; none for 0."""
    checkpointing: str | None
    tied: bool
    keep_logits: bool
    labels: str
    """few (as in visual question answering), all, or most of them."""
    cast: torch.dtype | None
    """Where not None, the dtype of autocast."""


def method_settings(draw, method: str) -> dict[str, object]:
    roles = draw(st.lists(st.sampled_from(("q", "k", "v", "o", "gate", "up", "down")), min_size=1, unique=True))
    targets = draw(st.sampled_from(("attention", "mlp", "both", tuple(roles))))
    if method == "lora":
        rank = draw(st.integers(1, 20))
        return {
            "r": rank, "alpha": draw(st.integers(1, 32)), "dropout": 0.0, "targets": targets,
            "rank_stabilized": draw(st.booleans()),
        }  # fmt: skip
    if method == "ia3":
        return {"targets": targets}
    if method == "adapter":
        return {
            "bottleneck": draw(st.integers(1, 20)), "dropout": 0.0, "targets": targets,
            "activation": draw(st.sampled_from(ACTIVATIONS)), "scaling": draw(st.sampled_from((0.5, 1.0, 4.0))),
            "placement": draw(st.sampled_from(("series", "parallel"))),
        }  # fmt: skip
    if method == "prefix":
        width = draw(st.sampled_from((None, 24)))
        return {
            "num_virtual_tokens": draw(st.integers(1, 9)), "projection": draw(st.booleans()), "projection_width": width,
        }  # fmt: skip
    parts = {name: draw(st.booleans()) for name in ("connector", "embeddings", "head")} if method == "layernorm" else {}
    return {"final": draw(st.booleans()), **parts}


@st.composite
def cases(draw, method: str) -> Case:
    settings_of_method = method_settings(draw, method)
    dtype = draw(st.sampled_from((torch.float64, torch.float64, torch.float32, torch.bfloat16)))
    # The re-entrant kind runs a backward pass a layer, and a projected prefix is one graph for all layers.
    kinds = (None, "non-reentrant") if settings_of_method.get("projection") else (None, "non-reentrant", "re-entrant")
    return Case(
        family=draw(st.sampled_from(sorted(FAMILIES))),
        method=method,
        by_peft=draw(st.booleans()),
        settings=tuple(settings_of_method.items()),
        dtype=dtype,
        batch_size=draw(st.integers(1, 4)),
        padding_side=draw(st.sampled_from(("left", "right", None))),
        num_layers=draw(st.integers(1, 2)),
        train_connector=draw(st.booleans()),
        frozen=draw(st.sampled_from((0, 0, 2, 3))),
        checkpointing=draw(st.sampled_from(kinds)),
        tied=draw(st.sampled_from((False, False, True))),
        keep_logits=draw(st.booleans()),
        labels=draw(st.sampled_from(("few", "all", "most"))),
        cast=draw(st.sampled_from((None, torch.bfloat16))) if dtype == torch.float32 else None,
    )


def model_of(case: Case) -> torch.nn.Module:
    """The unfused model of a case. Raises ValueError where it makes no sense."""
    model = tiny_model(case.family, num_layers=case.num_layers, dtype=case.dtype)
    if case.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    method = make_method(case.method, **dict(case.settings))
    # HF PEFT's prefix lives in a cache, which checkpointing switches off.
    if case.by_peft and not (case.method == "prefix" and case.checkpointing):
        model, _ = add_baseline(model, method, train_connector=case.train_connector)
    else:
        add_peft(model, method, train_connector=case.train_connector)
    randomize_trainable(model)
    if case.frozen:
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.requires_grad_(i % case.frozen != 0)
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "re-entrant"})
    return model.train()


def batch_of(case: Case) -> dict[str, torch.Tensor]:
    side, family = case.padding_side, case.family
    batch = tiny_batch(family, batch_size=case.batch_size, padding_side=side, dtype=case.dtype)
    if case.labels != "few":
        batch["labels"] = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    if case.labels == "most":
        batch["labels"][:, ::5] = -100
    return batch


def step(model: torch.nn.Module, batch: dict[str, torch.Tensor], cast: torch.dtype | None):
    with torch.autocast("cpu", dtype=cast or torch.bfloat16, enabled=cast is not None):
        model.zero_grad(set_to_none=True)
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def widened(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def check(case: Case) -> None:
    try:
        model = model_of(case)
    except ValueError as error:
        assert "expected" in str(error), error
        event(f"refused: {error}")
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return
    event("compared")
    batch = batch_of(case)
    truth_model = copy.deepcopy(model).double()
    eager = step(model, batch, case.cast)
    fuse(model, keep_logits=case.keep_logits, strict=True)
    assert not fuse_report(model).kept
    fused = step(model, batch, case.cast)
    assert fused[1].keys() == eager[1].keys()
    if case.dtype == torch.float64:
        assert_same_in_double(fused[0], eager[0], "loss")
        for name, grad in eager[1].items():
            assert_same_in_double(fused[1][name], grad, name)
    elif eager[1]:
        truth = loss_and_grads(truth_model, widened(batch))
        dtype = case.cast or case.dtype

        def flat(grads):
            return torch.cat([grads[name].double().flatten() for name in sorted(eager[1])])

        got, expected = flat(fused[1]).to(dtype), flat(eager[1]).to(dtype)
        assert_as_close_as_eager(got, expected, flat(truth[1]), "all gradients")
    torch.testing.assert_close(step(unfuse(model), batch, case.cast)[0], eager[0], rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
@given(data=st.data())
@settings(deadline=None, suppress_health_check=list(HealthCheck))
def test_fused_equals_unfused(method, data):
    check(data.draw(cases(method)))

"""What fused layers make again in the backward in place of keeping it: the same bits, and so many bytes less."""

import copy

import pytest
import torch

from mmpeft_fast import METHODS, add_peft, cli, fuse, fuse_report, make_method, saved_bytes, unfuse
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.ops.segments import Branch, Segment
from mmpeft_fast.peft_model import RECOMPUTE
from tests.tiny_models import (
    TEXT_FAMILIES,
    loss_and_grads,
    randomize_trainable,
    small_settings,
    tiny_batch,
    tiny_model,
)


def model_of(
    method: str = "lora", family: str = "llama", dtype: torch.dtype = torch.float32, num_layers: int = 2, **settings
):
    model = tiny_model(family, dtype=dtype, num_layers=num_layers)
    model = add_peft(model, make_method(method, **small_settings(method, dropout=0.1) | settings))
    randomize_trainable(model)
    return model.train()


def step(model, batch, **context):
    """Loss, gradients, and bytes that are kept for the backward, with the same dropout masks at every call."""
    torch.manual_seed(5)
    with saved_bytes(model) as saved:
        model(**batch)
    torch.manual_seed(5)
    return (*loss_and_grads(model, batch), saved.bytes)


def assert_same_bits(model, batch, recompute="gate_up+qkv") -> int:
    """Bytes saved less than without."""
    loss, grads, kept = step(fuse(model), batch)
    fuse(model, recompute=recompute)
    again_loss, again_grads, again_kept = step(model, batch)
    assert torch.equal(loss, again_loss)
    assert grads.keys() == again_grads.keys() and grads
    for name, grad in grads.items():
        assert torch.equal(grad, again_grads[name]), name
    return kept - again_kept


@pytest.mark.parametrize("recompute", RECOMPUTE[1:])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, recompute):
    """The last layer runs its queries and its MLP at the rows that predict a label, its keys and values by a call of
    their own: these stay. So do q, k and v of a first layer where nothing that makes them is trained."""
    model, batch = model_of(method, num_layers=3), tiny_batch("llama")
    config, tokens = model.config, batch["input_ids"].numel()
    supervised = int((batch["labels"][:, 1:] != -100).sum(1).max()) * len(batch["labels"])
    q_and_kv = config.num_attention_heads + 2 * config.num_key_value_heads
    values = 0
    if "gate_up" in recompute:
        values += (2 * tokens + supervised) * 2 * config.intermediate_size
    if "qkv" in recompute:
        placement = model.peft_method.place()
        parts = placement.branches_of("q") if "q" in placement.branches else ()
        is_first = "input_norm" in placement.gains or any(
            "down" not in part.frozen or part.vectors is not None for part in parts
        )
        values += (1 + is_first) * tokens * q_and_kv * config.head_dim
    assert assert_same_bits(model, batch, recompute) == values * 4


@pytest.mark.parametrize("family", [family for family in ("llava", "qwen2_vl", "qwen3") if family not in TEXT_FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_families_and_dtypes(family, dtype):
    batch = {
        name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in tiny_batch(family).items()
    }
    assert assert_same_bits(model_of(family=family, dtype=dtype), batch) > 0


def test_on_packed_weights():
    quantised = pytest.importorskip("mmpeft_fast.quantised")
    model = quantised.quantise(tiny_model("llama"), "nf4")
    add_peft(model, make_method("lora", **small_settings("lora", dropout=0.1))).train()
    randomize_trainable(model)
    assert assert_same_bits(model, tiny_batch("llama")) > 0


def test_under_autocast():
    model, batch = model_of(), tiny_batch("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert assert_same_bits(model, batch) > 0


def test_under_checkpointing_and_twice_through_one_graph():
    model, batch = model_of(), tiny_batch("llama")
    _, grads, _ = step(fuse(model), batch)
    fuse(model, recompute="gate_up+qkv")
    torch.manual_seed(5)
    loss = model(**batch).loss
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for _ in range(2):
        found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
        assert all(torch.equal(grad, grads[name]) for name, grad in zip(trained, found, strict=True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, grad in step(model, batch)[1].items():
        assert torch.equal(grad, grads[name]), name


def test_copies_and_unfuse():
    model, batch = model_of(), tiny_batch("llama")
    fuse(model, recompute="gate_up+qkv")
    kept = step(model, batch)[2]
    assert step(copy.deepcopy(model), batch)[2] == kept
    assert "made again in the backward: gate_up, qkv" in str(fuse_report(model))
    fuse(model)  # the last call counts
    assert fuse_report(model).recompute is None
    assert step(model, batch)[2] > kept
    unfuse(fuse(model, recompute="gate_up+qkv"))
    assert not any("recompute" in module.__dict__ for module in model.modules())


def test_compiled():
    model, batch = model_of(dropout=0.0), tiny_batch("llama")
    loss, grads = loss_and_grads(fuse(model, recompute="gate_up+qkv"), batch)
    compiled_loss, compiled_grads = loss_and_grads(torch.compile(model, backend="aot_eager"), batch)
    torch.testing.assert_close(compiled_loss, loss)
    for (name, grad), found in zip(grads.items(), compiled_grads.values(), strict=True):
        assert (found - grad).norm() <= 1e-4 * grad.norm(), name


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]), dtype=torch.float64)


@pytest.mark.parametrize("made_by", ["one call", "two calls", "a call with a residual", "something else"])
def test_only_what_one_call_has_made_is_made_again(made_by):
    """Else it is kept, and the gradients are right just the same."""
    x = weight(7, 6).requires_grad_()
    down, up = weight(2, 6).requires_grad_(), weight(8, 2).requires_grad_()
    segments = [Segment(weight(8, 6), None, (Branch(down, up, 0.5),)), Segment(weight(8, 6) + 1.0)]

    def run(recompute: bool):
        if made_by == "one call":
            gate, value = fused_linear(x, segments)
        elif made_by == "two calls":
            gate, value = (fused_linear(x, [segment]) for segment in segments)
        elif made_by == "a call with a residual":
            gate = value = fused_linear(x, [segments[0]], residual=weight(7, 8))
        else:
            gate, value = (segments[0].weight.mul(2.0)[:7] * x.sum(), x.sum() * weight(7, 6).repeat(1, 2)[:, :8])
            gate = gate.repeat(1, 2)[:, :8]
        holder = torch.nn.ParameterList([x, down, up])
        with saved_bytes(holder) as saved:
            y = fused_linear((gate, value), [Segment(weight(5, 8))], prologue="swiglu", recompute=recompute)
        wanted = [tensor for tensor in (x, down, up) if made_by != "something else" or tensor is x]
        return torch.autograd.grad(y.square().sum(), wanted), saved.bytes

    (grads, kept), (again, again_kept) = run(recompute=False), run(recompute=True)
    assert all(map(torch.equal, grads, again))
    assert (again_kept < kept) == (made_by == "one call")


def test_bad_values(capsys, tmp_path):
    with pytest.raises(ValueError, match=r"expected recompute to be one of \[None, 'gate_up', .*\], got 'o'"):
        fuse(model_of(), recompute="o")
    plan = ["plan", "--model", "llava-1.5-7b", "--recompute", "gate_up"]
    assert cli.main([*plan, "--implementation", "peft"]) == 2
    assert "recompute: expected implementation fused without checkpointing" in capsys.readouterr().err

"""Weights as rows of one buffer, with spare columns or without: the same model to everybody who looks at it."""

import copy

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from mmpeft_fast import LoRA, add_peft, fuse, unfuse
from mmpeft_fast.layers.stacked_weights import owners, stack_rows
from mmpeft_fast.ops import dispatch, layout, stacking
from mmpeft_fast.ops.fused_linear import fused_linear, fused_linear_ref
from tests.closeness import assert_as_close_as_eager, assert_exact
from tests.ops.calls import make_call
from tests.ops.test_fused_linear import run
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model


@pytest.fixture
def layout_everywhere(monkeypatch):
    monkeypatch.setattr(dispatch, "wants_layout", lambda *arguments: True)
    monkeypatch.setattr("mmpeft_fast.ops.schedule.SMALL_M", 1)
    used = []
    multiply = layout.multiply
    monkeypatch.setattr(layout, "multiply", lambda *args, **kwargs: used.append(1) or multiply(*args, **kwargs))
    return used


def lora_model():
    torch.manual_seed(0)
    model = add_peft(tiny_model("llava"), LoRA(r=4, alpha=8, dropout=0.1))
    randomize_trainable(model)
    return model.train()


def linears_of(model):
    layer = model.model.language_model.layers[0]
    return layer.self_attn, layer.mlp


def test_fuse_stacks_what_shares_an_input():
    model = lora_model()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    attn, mlp = linears_of(fuse(model))
    for group in ([attn.q_proj, attn.k_proj, attn.v_proj], [mlp.gate_proj, mlp.up_proj]):
        assert stacking.as_rows([linear.weight for linear in group]) is not None
        assert stacking.as_rows([linear.branches[0].down for linear in group]) is not None
        assert stacking.as_rows([linear.branches[0].up for linear in group]) is not None
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1]), name
    stored = model.state_dict()
    assert all(torch.equal(stored[name], value) for name, (_, value) in before.items())


def test_what_others_may_hold_stays_where_it_is():
    tied = torch.nn.Parameter(torch.randn(4, 3))
    model = torch.nn.Module()
    model.a, model.b = tied, torch.nn.Parameter(tied.detach())  # two parameters over one memory
    model.c, model.d = (torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    model.part = torch.nn.Parameter(torch.randn(8, 3)[:4])
    owned = owners(model)
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for group in ([model.a, model.c], [model.c, model.part], [model.c, model.c]):
        assert not stack_rows(group, owned)
    assert places == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert stack_rows([model.c, model.d], owned) and stacking.as_rows([model.c, model.d]) is not None
    assert not stack_rows([model.d, model.c], owned), "they share a buffer now"


def test_layout_gives_the_composite_results(layout_everywhere):
    plain, laid = lora_model(), lora_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "wants_layout", lambda *arguments: False)
        fuse(plain)
    fuse(laid)
    batch = tiny_batch("llava")
    torch.manual_seed(1)
    expected, expected_grads = loss_and_grads(plain, batch)
    assert not layout_everywhere
    torch.manual_seed(1)
    loss, grads = loss_and_grads(laid, batch)
    assert len(layout_everywhere) >= 2 * 3  # two layers, three calls whose prologue writes h anyway
    torch.testing.assert_close(loss, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])


def test_layout_follows_every_change_of_the_adapters(layout_everywhere):
    model, batch = fuse(lora_model()).eval(), tiny_batch("llava")
    logits = model(**batch).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".up"):
                parameter.data.zero_()  # by the way that autograd does not see
    changed = model(**batch).logits
    assert not torch.equal(logits, changed)
    unfuse(model)
    torch.testing.assert_close(changed, model(**batch).logits)


def test_spare_columns_are_nobody_elses_business(layout_everywhere, tmp_path):
    model = lora_model()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model)
    attn, _ = linears_of(model)
    assert layout.spare_columns(attn.q_proj.weight) > 0
    stored = model.state_dict()
    assert stored.keys() == values.keys()
    assert all(torch.equal(stored[name], value) and stored[name].shape == value.shape for name, value in values.items())
    twin = copy.deepcopy(model)
    assert layout.spare_columns(linears_of(twin)[0].q_proj.weight) == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    model.load_state_dict(values)
    unfuse(model).to(torch.float64)
    assert layout.spare_columns(attn.q_proj.weight) == 0


def test_saves_and_loads_as_before(layout_everywhere, tmp_path):
    model = fuse(tiny_model("llava"))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    unfuse(model).save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(value, values[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prologue", ["rms_norm", "swiglu"])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"activation": "tanh"}], ids=str)
def test_layout_against_the_definition(layout_everywhere, dtype, prologue, options):
    call = make_call(
        prologue=prologue, positions=("parallel",), num_segments=2, dropout=0.2, lead=(33,), width=40, num_out=24,
        rank=5, dtype=dtype, **options,
    )  # fmt: skip
    holder = torch.nn.ParameterList([torch.nn.Parameter(seg.weight.detach().clone()) for seg in call.segments])
    assert stack_rows(list(holder), owners(holder), spare=16)
    call.segments = [seg._replace(weight=weight) for seg, weight in zip(call.segments, holder, strict=True)]
    outputs, upstream, grads = run(call, fused_linear)
    assert layout_everywhere
    eager, _, eager_grads = run(call, fused_linear_ref, upstream=upstream)
    if dtype == torch.float64:
        for got, expected in zip((*outputs, *grads.values()), (*eager, *eager_grads.values()), strict=True):
            assert_exact(got, expected)
        return
    wide = call.map(lambda tensor: tensor.detach().double().requires_grad_())
    truth, _, true_grads = run(wide, fused_linear_ref, upstream=[grad.double() for grad in upstream])
    for got, plain, true in zip(outputs, eager, truth, strict=True):
        assert_as_close_as_eager(got, plain, true, "y")
    for name, grad in grads.items():
        assert_as_close_as_eager(grad, eager_grads[name], true_grads[name], name)

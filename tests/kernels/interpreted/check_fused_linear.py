"""The whole fused linear on the Triton provider, forward and every gradient."""

import logging

import pytest
import torch

from mmpeft_fast import provider
from mmpeft_fast.ops import kernels_torch, kernels_triton, providers
from mmpeft_fast.ops.fused_linear import fused_linear, fused_linear_ref
from tests.closeness import assert_as_close_as_eager
from tests.ops.calls import as_tuple, make_call
from tests.ops.test_fused_linear import run


def run_on_triton(call, name="triton", **options):
    def forward(*arguments, **keywords):
        with provider(name):
            return fused_linear(*arguments, **keywords)

    return run(call, forward, **options)


def used(call, name="triton") -> object:
    """The kernels that the call really ran on."""
    with provider(name):
        output = as_tuple(fused_linear(*call.arguments(), **call.options))[0]
    node = output.grad_fn
    while not hasattr(node, "runner"):
        node = node.next_functions[0][0]
    return node.runner.kernels


def stacked(call):
    """The same call with weights, biases and branches of its segments as rows of one buffer each."""
    groups = [[seg.weight for seg in call.segments], [seg.bias for seg in call.segments]]
    for place in range(len(call.segments[0].branches)):
        groups += [[seg.branches[place][i] for seg in call.segments] for i in (0, 1)]
    moved = {}
    for group in groups:
        if group[0] is not None:
            parts = torch.cat([tensor.detach() for tensor in group]).split([tensor.shape[0] for tensor in group])
            moved |= {id(old): new.requires_grad_(old.requires_grad) for old, new in zip(group, parts, strict=True)}
    return call.map(lambda tensor: moved.get(id(tensor), tensor))


def check_against_eager(call, name="triton", kernels=kernels_triton):
    assert used(call, name) is kernels
    outputs, upstream, grads = run_on_triton(call, name)
    eager, _, eager_grads = run(call, fused_linear_ref, upstream=upstream)
    wide = call.map(lambda tensor: tensor.detach().double().requires_grad_(tensor.requires_grad))
    truth, _, true_grads = run(wide, fused_linear_ref, upstream=[grad.double() for grad in upstream])
    for got, plain, true in zip(outputs, eager, truth, strict=True):
        assert_as_close_as_eager(got, plain, true, "y")
    assert set(grads) == set(true_grads)
    for name, grad in grads.items():
        assert grad.dtype == eager_grads[name].dtype
        assert_as_close_as_eager(grad, eager_grads[name], true_grads[name], f"d{name}")


LORA = {"positions": ("parallel",), "dropout": 0.2, "bias": True}
CASES = {
    "lora": {**LORA, "residual": True},
    "two segments": {**LORA, "num_segments": 2, "activation": "tanh"},
    "ia3": {"in_scale": True, "out_scale": True},
    "adapter pre": {"positions": ("pre",), "num_segments": 2, "activation": "tanh", "dropout": 0.2},
    "adapter post": {"positions": ("post",), "activation": "tanh", "dropout": 0.2, "residual": True},
    "gated": {**LORA, "num_segments": 2, "activation": "tanh", "gate": (17, 5)},
    "everything": {
        "positions": ("parallel", "parallel", "pre", "post", "post"), "activation": "gelu", "bias": True,
        "out_scale": True, "in_scale": True, "residual": True, "dropout": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("prologue", ["none", "rms_norm", "swiglu"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(dtype, prologue, case):
    check_against_eager(
        make_call(prologue=prologue, lead=(17,), width=33, num_out=40, rank=5, dtype=dtype, **CASES[case])
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("prologue", ["rms_norm", "swiglu"])
def test_stacked_segments_run_together(dtype, prologue):
    call = make_call(prologue=prologue, lead=(17,), width=33, num_out=40, rank=5, dtype=dtype, num_segments=3, **LORA)
    check_against_eager(stacked(call))


@pytest.mark.parametrize("name", ["0.parallel0.down", "0.parallel0.up", "x0", "gain"])
def test_each_gradient_alone(name):
    call = make_call(prologue="rms_norm", positions=("parallel",), dropout=0.2, dtype=torch.float32)
    names = {id(tensor): key for key, tensor in call.named_tensors().items()}
    alone = call.map(lambda tensor: tensor.detach().requires_grad_(names[id(tensor)] == name))
    _, upstream, grads = run_on_triton(alone)
    _, _, expected = run(alone, fused_linear, upstream=upstream)
    assert list(grads) == [name]
    torch.testing.assert_close(grads[name], expected[name])


def test_float64_goes_to_torch_and_says_so_once(caplog):
    providers.log_fallback.cache_clear()
    call = make_call(positions=("parallel",))
    with caplog.at_level(logging.WARNING):
        assert used(call) is kernels_torch
        assert used(call) is kernels_torch
    assert [record.message for record in caplog.records] == [
        "fused_linear: the triton provider cannot run float64; the torch provider does"
    ]

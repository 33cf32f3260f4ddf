"""The whole fused linear on the Triton provider, forward and every gradient."""

import logging

import pytest
import torch

from mmpeft_fast import provider
from mmpeft_fast.ops import fused_linear_torch, fused_linear_triton, providers
from mmpeft_fast.ops.fused_linear import fused_linear, fused_linear_ref
from tests.closeness import assert_as_close_as_eager
from tests.ops.calls import as_tuple, make_call
from tests.ops.test_fused_linear import run


def run_on_triton(call, **options):
    def forward(*arguments, **keywords):
        with provider("triton"):
            return fused_linear(*arguments, **keywords)

    return run(call, forward, **options)


def used(call) -> object:
    """The provider module that the call really ran on."""
    with provider("triton"):
        output = as_tuple(fused_linear(*call.arguments(), **call.options))[0]
    node = output.grad_fn
    while not hasattr(node, "implementation"):
        node = node.next_functions[0][0]
    return node.implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("prologue", ["none", "rms_norm", "swiglu"])
@pytest.mark.parametrize(
    "options",
    [
        {"positions": ("parallel",), "dropout": 0.2, "residual": True, "bias": True},
        {"positions": ("parallel",), "num_segments": 2, "activation": "tanh"},
        {"positions": (), "in_scale": True},
    ],
    ids=["lora", "two segments", "ia3"],
)
def test_forward_and_gradients(dtype, prologue, options):
    call = make_call(prologue=prologue, lead=(17,), width=33, num_out=40, rank=5, dtype=dtype, **options)
    frozen = {id(seg.weight) for seg in call.segments} | {id(seg.bias) for seg in call.segments}
    call = call.map(lambda tensor: tensor.detach().requires_grad_(id(tensor) not in frozen))
    assert used(call) is fused_linear_triton
    outputs, upstream, grads = run_on_triton(call)
    eager, _, eager_grads = run(call, fused_linear_ref, upstream=upstream)
    wide = call.map(lambda tensor: tensor.detach().double().requires_grad_(tensor.requires_grad))
    truth, _, true_grads = run(wide, fused_linear_ref, upstream=[grad.double() for grad in upstream])
    for got, plain, true in zip(outputs, eager, truth, strict=True):
        assert_as_close_as_eager(got, plain, true, "y")
    assert set(grads) == set(true_grads)
    for name, grad in grads.items():
        assert grad.dtype == eager_grads[name].dtype
        assert_as_close_as_eager(grad, eager_grads[name], true_grads[name], f"d{name}")


@pytest.mark.parametrize("name", ["0.parallel0.down", "0.parallel0.up", "x0", "gain"])
def test_each_gradient_alone(name):
    call = make_call(prologue="rms_norm", positions=("parallel",), dropout=0.2, dtype=torch.float32)
    names = {id(tensor): key for key, tensor in call.named_tensors().items()}
    alone = call.map(lambda tensor: tensor.detach().requires_grad_(names[id(tensor)] == name))
    _, upstream, grads = run_on_triton(alone)
    _, _, expected = run(alone, fused_linear, upstream=upstream)
    assert list(grads) == [name]
    torch.testing.assert_close(grads[name], expected[name])


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"positions": ("pre",)}, "pre and post branches"),
        ({"positions": ("parallel", "parallel")}, "several branches on one segment"),
        ({"positions": ("parallel",), "out_scale": True}, "output scales"),
        ({"positions": ()}, "trained base weights"),
    ],
)
def test_the_rest_goes_to_torch_and_says_so_once(options, reason, caplog):
    providers.log_fallback.cache_clear()
    call = make_call(dtype=torch.float32, **options)
    with caplog.at_level(logging.WARNING):
        assert used(call) is fused_linear_torch
        assert used(call) is fused_linear_torch
    assert [record.message for record in caplog.records if reason in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1

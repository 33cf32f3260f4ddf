"""Attention on the Triton provider: head transforms, rotation and prefix around the library's flash attention."""

import pytest
import torch

from mmpeft_fast import provider
from mmpeft_fast.ops.attention import attention, attention_ref
from tests.closeness import assert_as_close_as_eager
from tests.ops.test_attention import make, run, widened


def on_triton(*inputs, **options):
    with provider("triton"):
        return attention(*inputs, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, "left"])
@pytest.mark.parametrize("scales, norms", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("rows", [False, True])
def test_forward_and_gradients(dtype, mask, scales, norms, rows):
    case = make(prefix=3, scales=scales, norms=norms, mask=mask, rows=rows, dtype=dtype)
    out, grads = run(on_triton, *case)
    eager, eager_grads = run(attention_ref, *case)
    truth, true_grads = run(attention_ref, *widened(case))
    assert_as_close_as_eager(out, eager, truth, "out")
    for i, (got, plain, true) in enumerate(zip(grads, eager_grads, true_grads, strict=True)):
        assert got.dtype == plain.dtype
        assert_as_close_as_eager(got, plain, true, f"gradient {i}")


def test_columns_of_one_buffer_give_columns_of_one_buffer():
    """q, k and v from one GEMM: their gradients are operands of one GEMM again."""
    (q, k, v, cos, sin), options, tensors = make(dtype=torch.float32)
    widths = [part.shape[-1] for part in (q, k, v)]
    stacked = torch.cat([part.detach() for part in (q, k, v)], dim=-1).requires_grad_()
    parts = stacked.split(widths, dim=-1)
    seen = {}
    for name, part in zip("qkv", parts, strict=True):
        part.register_hook(lambda grad, name=name: seen.__setitem__(name, grad))
    out = on_triton(*parts, cos, sin, **options)
    plain = attention(q, k, v, cos, sin, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(upstream)
    expected = torch.autograd.grad(plain, tensors[:3], upstream)
    assert len({grad.untyped_storage().data_ptr() for grad in seen.values()}) == 1
    for name, grad in zip("qkv", expected, strict=True):
        torch.testing.assert_close(seen[name], grad)

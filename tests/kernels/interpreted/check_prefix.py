"""The prefix part of attention and its gradients, against one softmax over prefix and main keys."""

import pytest
import torch
from mmpeft_kernels.prefix import merge_prefix_, prefix_backward_
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.attention import concat_prefix_attention
from mmpeft_fast.ops.flash import FlashResult, flash_backward, flash_forward
from tests.closeness import assert_as_close_as_eager

TILE = Tile(block_m=16, block_n=16)


def in_heads(*shape):
    """[B, H, T, DH], laid out as the projections are: [B, T, H, DH] in memory."""
    return torch.randn(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "batch, heads, kv_heads, length, num_prefix, head_dim",
    [(1, 1, 1, 1, 2, 8), (2, 4, 2, 33, 20, 24)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_prefix(dtype, batch, heads, kv_heads, length, num_prefix, head_dim, padded):
    torch.manual_seed(0)
    scale = head_dim**-0.5
    q = in_heads(batch, heads, length, head_dim).to(dtype)
    k, v = (in_heads(batch, kv_heads, length, head_dim).to(dtype) for _ in range(2))
    prefix = tuple(torch.randn(kv_heads, num_prefix, head_dim).to(dtype) for _ in range(2))
    dout = in_heads(batch, heads, length, head_dim).to(dtype)
    mask = alive = None
    if padded:  # the first positions of the first sample are padding: they see nothing of the main part
        alive = torch.ones(batch, length, dtype=torch.bool)
        alive[0, : length // 2 + 1] = False
        mask = (torch.ones(length, length, dtype=torch.bool).tril() & alive[:, None])[:, None]

    def definition(cast):
        leaves = [cast(part).detach().requires_grad_() for part in (q, k, v, *prefix)]
        out = concat_prefix_attention(
            *leaves[:3], scale=scale, mask=mask, causal=mask is None, prefix=(leaves[3], leaves[4])
        )
        return out, *torch.autograd.grad(out, leaves, cast(dout))

    result = flash_forward(q, k, v, mask, mask is None, scale)
    out, lse = result.out.clone(), result.lse.float().clone()
    merge_prefix_(q, *prefix, out, lse, scale=scale, alive=alive, tile=TILE)
    dq, dk, dv = flash_backward(dout, q, k, v, FlashResult(out, lse, result.extra), mask, mask is None, scale)
    dprefix = prefix_backward_(dout, q, *prefix, out, lse, dq, scale=scale, tile=TILE)
    names = ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
    eager, truth = definition(torch.Tensor.clone), definition(torch.Tensor.double)
    for got, plain, true, what in zip((out, dq, dk, dv, *dprefix), eager, truth, names):
        assert got.dtype == dtype
        assert_as_close_as_eager(got, plain, true, what)


def test_wide_dtype_errors_and_no_rows():
    q = torch.randn(1, 2, 5, 8).half()
    prefix = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    out, lse, dq = torch.zeros_like(q), torch.full((1, 2, 8), -100.0), torch.zeros_like(q)
    merge_prefix_(q, *prefix, out, lse, scale=1.0)  # lse may be longer than the queries
    assert out.any() and (lse[..., 5:] == -100).all()
    grads = prefix_backward_(q, q, *prefix, out, lse, dq, scale=1.0)
    assert all(grad.dtype == torch.float32 and grad.shape == (1, 3, 8) for grad in grads)
    message = r"at least one virtual token and key/value heads that divide 2 heads, got prefix keys \[3, 3, 8\]"
    with pytest.raises(ValueError, match=message):
        merge_prefix_(q, torch.zeros(3, 3, 8), torch.zeros(3, 3, 8), out, lse, scale=1.0)
    merge_prefix_(q[:, :, :0], *prefix, out[:, :, :0], lse[:, :, :0], scale=1.0)

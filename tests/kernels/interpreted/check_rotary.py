"""Rotation and scale of heads, forward and backward, on single and stacked tensors."""

import pytest
import torch
from mmpeft_kernels.rotary import rotary, rotary_backward
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.rotary import rotary_cos_sin, rotate
from tests.closeness import assert_as_close_as_eager

TILE = Tile(block_m=16, block_n=2)


def reference(x, scale, cos, sin, head_dim, num_rotated, first_scaled):
    heads = x.unflatten(-1, (-1, head_dim))
    if scale is not None:
        factors = torch.cat((scale.new_ones(first_scaled * head_dim), scale)).unflatten(0, (-1, head_dim))
        heads = heads * factors
    repeats = x.shape[0] // cos.shape[0]
    cos, sin = (part.repeat(repeats, 1)[:, None] for part in (cos, sin))
    rotated = rotate(heads[:, :num_rotated], cos, sin)
    return torch.cat((rotated, heads[:, num_rotated:]), dim=1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "batch, length, head_dim, num_heads, num_rotated, first_scaled, with_scale",
    [
        (1, 1, 8, 2, 2, 0, False),
        (2, 17, 12, 7, 6, 5, True),  # stacked q (5 heads), k and v: k is scaled and rotated, v only scaled
        (3, 7, 16, 3, 3, 0, True),
    ],
)
def test_rotary(dtype, batch, length, head_dim, num_heads, num_rotated, first_scaled, with_scale):
    torch.manual_seed(0)
    width = num_heads * head_dim
    x = torch.randn(batch * length, width + 5).to(dtype)[:, :width]
    dy = torch.randn(batch * length, width).to(dtype)
    scale = torch.randn((num_heads - first_scaled) * head_dim).to(dtype) if with_scale else None
    # mRoPE: three positions a token.
    sections = [head_dim // 2 - 2, 1, 1]
    positions = torch.randint(0, 50, (3, 1, length))
    angles = rotary_cos_sin(positions, torch.rand(head_dim // 2), sections=sections)
    cos, sin = (part[0].to(dtype) for part in angles)
    shape = {"head_dim": head_dim, "num_rotated": num_rotated, "first_scaled": first_scaled}

    def run(cast):
        leaves = [cast(x).requires_grad_(), *([cast(scale).requires_grad_()] if with_scale else [])]
        y = reference(leaves[0], leaves[1] if with_scale else None, cast(cos), cast(sin), **shape)
        return y, *torch.autograd.grad(y, leaves, cast(dy))

    y = rotary(x, cos, sin, scale=scale, tile=TILE, **shape)
    dx, dscale = rotary_backward(dy, cos, sin, scale=scale, x=x, tile=TILE, **shape)
    got = (y, dx) if scale is None else (y, dx, dscale)
    assert with_scale or dscale is None
    for part, plain, true, what in zip(got, run(torch.Tensor.clone), run(torch.Tensor.double), ("y", "dx", "dscale")):
        assert part.dtype == dtype
        assert_as_close_as_eager(part, plain, true, what)


def test_in_place_needs_and_no_rows():
    x, scale = torch.randn(5, 24), torch.randn(24)
    cos, sin = (part[0] for part in rotary_cos_sin(torch.arange(5)[None], torch.rand(4)))
    expected = rotary(x, cos, sin, head_dim=8, scale=scale)
    assert rotary(x, cos, sin, head_dim=8, scale=scale, out=x) is x and torch.equal(x, expected)
    dx, dscale = rotary_backward(expected, cos, sin, head_dim=8, scale=scale)
    assert dscale is None
    assert rotary_backward(expected, cos, sin, head_dim=8, scale=scale, out=expected)[0] is expected
    assert torch.equal(dx, expected)
    assert rotary(x[:0], cos, sin, head_dim=8).shape == (0, 24)

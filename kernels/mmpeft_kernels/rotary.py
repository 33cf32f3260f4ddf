"""Rotary embedding with a per-channel scale (IA3 on k and v) folded in; forward and backward, in place where asked.

    y = rotate(x l),  rotate(x) = [x1 cos1 - x2 sin1, x2 cos2 + x1 sin2]          (halves of a head)
    dx = rotate^T(dy) l,  dl = sum over tokens of rotate^T(dy) x

x may be the stacked output of q, k and v: heads from `num_rotated` on (v) are only scaled, heads before `first_scaled`
(q) are only rotated. Grouped-query attention is a number of heads, mRoPE other cosines and sines.
"""

import triton
import triton.language as tl

from mmpeft_kernels.reduction import sum_partials
from mmpeft_kernels.tile import Tile, cdiv

# block_m tokens; block_n heads that one program walks through with the same cosines.
DEFAULT_TILE = Tile(block_m=16, block_n=8, num_warps=4)


@triton.jit
def _rotary_kernel(
    in_ptr, x_ptr, scale_ptr, cos_ptr, sin_ptr, out_ptr, dscale_ptr,
    M, HALF, num_heads, num_rotated, first_scaled, num_positions, stride_inm, stride_xm, stride_outm, stride_cos,
    BACKWARD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_HALF)
    mask = (offs_m < M)[:, None] & (offs_d < HALF)[None, :]
    position = (offs_m % num_positions)[:, None] * stride_cos + offs_d[None, :]
    cos1 = tl.load(cos_ptr + position, mask=mask, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + position + HALF, mask=mask, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + position, mask=mask, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + position + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = in_ptr.dtype.element_ty
    first_head = tl.program_id(1) * BLOCK_HEADS
    for head in range(first_head, tl.minimum(first_head + BLOCK_HEADS, num_heads)):
        offs = offs_m[:, None] * stride_inm + head * 2 * HALF + offs_d[None, :]
        part1 = tl.load(in_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        part2 = tl.load(in_ptr + offs + HALF, mask=mask, other=0.0).to(tl.float32)
        is_rotated = head < num_rotated
        c1, c2 = tl.where(is_rotated, cos1, 1.0), tl.where(is_rotated, cos2, 1.0)
        s1, s2 = tl.where(is_rotated, sin1, 0.0), tl.where(is_rotated, sin2, 0.0)
        if scale_ptr is not None:
            channel = (head - first_scaled) * 2 * HALF + offs_d
            scaled = offs_d < tl.where(head >= first_scaled, HALF, 0)
            scale1 = tl.load(scale_ptr + channel, mask=scaled, other=1.0).to(tl.float32)[None, :]
            scale2 = tl.load(scale_ptr + channel + HALF, mask=scaled, other=1.0).to(tl.float32)[None, :]
        if BACKWARD:
            out1 = (part1 * c1 + part2 * s2).to(dtype)
            out2 = (part2 * c2 - part1 * s1).to(dtype)
            if dscale_ptr is not None:
                x_offs = offs_m[:, None] * stride_xm + head * 2 * HALF + offs_d[None, :]
                x1 = tl.load(x_ptr + x_offs, mask=mask, other=0.0).to(tl.float32)
                x2 = tl.load(x_ptr + x_offs + HALF, mask=mask, other=0.0).to(tl.float32)
                row = dscale_ptr + pid_m * (num_heads - first_scaled) * 2 * HALF + channel
                tl.store(row, tl.sum(out1.to(tl.float32) * x1, axis=0), mask=scaled)
                tl.store(row + HALF, tl.sum(out2.to(tl.float32) * x2, axis=0), mask=scaled)
            if scale_ptr is not None:
                out1, out2 = (out1.to(tl.float32) * scale1).to(dtype), (out2.to(tl.float32) * scale2).to(dtype)
        else:
            if scale_ptr is not None:
                part1, part2 = (part1 * scale1).to(dtype).to(tl.float32), (part2 * scale2).to(dtype).to(tl.float32)
            out1 = (part1 * c1 - part2 * s1).to(dtype)
            out2 = (part2 * c2 + part1 * s2).to(dtype)
        out = out_ptr + offs_m[:, None] * stride_outm + head * 2 * HALF + offs_d[None, :]
        tl.store(out, out1, mask=mask)
        tl.store(out + HALF, out2, mask=mask)


def _launch(inputs, x, scale, cos, sin, out, dscale, head_dim, num_rotated, first_scaled, backward, tile):
    (num_rows, width), half = inputs.shape, head_dim // 2
    num_heads = width // head_dim
    if not num_rows:
        return
    _rotary_kernel[(cdiv(num_rows, tile.block_m), cdiv(num_heads, tile.block_n))](
        inputs, x, scale, cos, sin, out, dscale,
        num_rows, half, num_heads, num_heads if num_rotated is None else num_rotated, first_scaled, cos.shape[0],
        inputs.stride(0), 0 if x is None else x.stride(0), out.stride(0), cos.stride(0),
        BACKWARD=backward, BLOCK_M=tile.block_m, BLOCK_HEADS=tile.block_n,
        BLOCK_HALF=1 << (half - 1).bit_length(), **tile.options,
    )  # fmt: skip


def rotary(x, cos, sin, *, head_dim, scale=None, num_rotated=None, first_scaled=0, out=None, tile: Tile = DEFAULT_TILE):
    """The heads of x [M, heads * head_dim] scaled, then rotated; into `out` (x itself for in place) or a new tensor.

    cos, sin [M or T, head_dim]: row m of x takes row m modulo their length, so that one set serves a batch.
    scale: [(heads - first_scaled) * head_dim] of the heads from `first_scaled` on, any float dtype, or None.
    num_rotated: heads before it are rotated; all when None. Unit column strides.
    """
    import torch

    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    _launch(x, None, scale, cos, sin, out, None, head_dim, num_rotated, first_scaled, False, tile)
    return out


def rotary_backward(
    dy, cos, sin, *, head_dim, scale=None, x=None, num_rotated=None, first_scaled=0, out=None,
    tile: Tile = DEFAULT_TILE,
):  # fmt: skip
    """(dx [M, heads * head_dim], dscale as `scale` or None). `x`, the forward's input, is given where dscale is wanted;
    the rest as in `rotary`; `out` may be dy itself."""
    import torch

    out = torch.empty_like(dy, memory_format=torch.contiguous_format) if out is None else out
    partial = None
    if scale is not None and x is not None:
        partial = dy.new_empty(cdiv(dy.shape[0], tile.block_m), scale.shape[0], dtype=torch.float32)
    _launch(dy, x, scale, cos, sin, out, partial, head_dim, num_rotated, first_scaled, True, tile)
    return out, (None if partial is None else sum_partials(partial, scale.dtype))

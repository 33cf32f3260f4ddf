"""What happens to the heads of q, k and v between their GEMM and the softmax: scale (IA3), head norm (Qwen3), rotation.

    s = x l,  n = s rstd gain with rstd = (mean(s^2) + eps)^-1/2 over a head,  y = rotate(n)
    rotate(x) = [x1 cos1 - x2 sin1, x2 cos2 + x1 sin2]                             (halves of a head)
    dn = rotate^T(dy),  dgain = sum dn s rstd,  ds = the norm's gradient,  dl = sum over tokens of ds x,  dx = ds l

One launch for up to three parts, whose matrices may be columns of one buffer. Grouped-query attention is a number of
heads, mRoPE other cosines and sines. Products are rounded to x's dtype where the torch provider rounds them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from mmpeft_kernels.launch import launch
from mmpeft_kernels.reduction import sum_partials
from mmpeft_kernels.tile import Tile, cdiv

# block_m tokens; block_n heads that one program walks through with the same cosines.
DEFAULT_TILE = Tile(block_m=16, block_n=8, num_warps=4)
MAX_PARTS = 3


class Heads(NamedTuple):
    """One of q, k, v: x [..., heads * head_dim] of the GEMM; scale [heads * head_dim], gain [head_dim] of any float
    dtype. x may be None in the backward where neither a gain nor dscale needs it."""

    x: object | None
    scale: object | None = None
    gain: object | None = None
    rotated: bool = True


class HeadsGrads(NamedTuple):
    dx: object  # as dy
    dscale: object | None  # [heads * head_dim] in scale's dtype
    dgain: object | None  # [head_dim] in gain's dtype


@triton.jit
def _load_halves(ptr, offs, HALF, mask, other):
    """Both halves of the heads at `offs`, in float32."""
    first = tl.load(ptr + offs, mask=mask, other=other).to(tl.float32)
    return first, tl.load(ptr + offs + HALF, mask=mask, other=other).to(tl.float32)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _head_rstd(x1, x2, mask_m, HALF, eps):
    rstd = tl.rsqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / (2 * HALF) + eps)
    return tl.where(mask_m, rstd, 0.0)[:, None]


@triton.jit
def _transform(
    x_ptr, scale_ptr, gain_ptr, out_ptr, cos_ptr, sin_ptr, num_heads, stride_xm, stride_outm, block,
    M, HALF, num_positions, stride_cos, stride_sin, eps,
    ROTATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Heads [block * BLOCK_HEADS, ...) of one part."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_HALF)
    mask_m, mask_d = offs_m < M, offs_d < HALF
    mask = mask_m[:, None] & mask_d[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    if ROTATED:
        position = (offs_m % num_positions)[:, None]
        cos1, cos2 = _load_halves(cos_ptr, position * stride_cos + offs_d[None, :], HALF, mask, 0.0)
        sin1, sin2 = _load_halves(sin_ptr, position * stride_sin + offs_d[None, :], HALF, mask, 0.0)
    if gain_ptr is not None:
        gain1, gain2 = _load_halves(gain_ptr, offs_d, HALF, mask_d, 0.0)
    first_head = block * BLOCK_HEADS
    for head in range(first_head, tl.minimum(first_head + BLOCK_HEADS, num_heads)):
        channel = head * 2 * HALF + offs_d
        x1, x2 = _load_halves(x_ptr, offs_m[:, None] * stride_xm + channel[None, :], HALF, mask, 0.0)
        if scale_ptr is not None:
            scale1, scale2 = _load_halves(scale_ptr, channel, HALF, mask_d, 0.0)
            x1, x2 = _rounded(x1 * scale1[None, :], dtype), _rounded(x2 * scale2[None, :], dtype)
        if gain_ptr is not None:
            rstd = _head_rstd(x1, x2, mask_m, HALF, eps)
            x1 = _rounded(_rounded(x1 * rstd, dtype) * gain1[None, :], dtype)
            x2 = _rounded(_rounded(x2 * rstd, dtype) * gain2[None, :], dtype)
        if ROTATED:
            x1, x2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
        out = out_ptr + offs_m[:, None] * stride_outm + channel[None, :]
        tl.store(out, x1.to(dtype), mask=mask)
        tl.store(out + HALF, x2.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["num_q_heads", "num_k_heads", "num_v_heads", "num_q_blocks", "num_k_blocks"])
def _rotary_kernel(
    q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, q_gain_ptr, k_gain_ptr, v_gain_ptr,
    q_out_ptr, k_out_ptr, v_out_ptr, num_q_heads, num_k_heads, num_v_heads, num_q_blocks, num_k_blocks,
    stride_qm, stride_km, stride_vm, stride_q_outm, stride_k_outm, stride_v_outm,
    cos_ptr, sin_ptr, M, HALF, num_positions, stride_cos, stride_sin, eps,
    Q_ROTATED: tl.constexpr, K_ROTATED: tl.constexpr, V_ROTATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    if block < num_q_blocks:
        _transform(
            q_ptr, q_scale_ptr, q_gain_ptr, q_out_ptr, cos_ptr, sin_ptr, num_q_heads, stride_qm, stride_q_outm,
            block, M, HALF, num_positions, stride_cos, stride_sin, eps, Q_ROTATED, BLOCK_M, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
    elif block < num_q_blocks + num_k_blocks:
        if k_ptr is not None:
            _transform(
                k_ptr, k_scale_ptr, k_gain_ptr, k_out_ptr, cos_ptr, sin_ptr, num_k_heads, stride_km, stride_k_outm,
                block - num_q_blocks, M, HALF, num_positions, stride_cos, stride_sin, eps,
                K_ROTATED, BLOCK_M, BLOCK_HEADS, BLOCK_HALF,
            )  # fmt: skip
    elif v_ptr is not None:
        _transform(
            v_ptr, v_scale_ptr, v_gain_ptr, v_out_ptr, cos_ptr, sin_ptr, num_v_heads, stride_vm, stride_v_outm,
            block - num_q_blocks - num_k_blocks, M, HALF, num_positions, stride_cos, stride_sin, eps,
            V_ROTATED, BLOCK_M, BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip


@triton.jit
def _transform_backward(
    dy_ptr, x_ptr, scale_ptr, gain_ptr, dx_ptr, dscale_ptr, dgain_ptr, cos_ptr, sin_ptr,
    num_heads, stride_dym, stride_xm, stride_dxm, block,
    M, HALF, num_positions, stride_cos, stride_sin, stride_partial, eps,
    ROTATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Heads [block * BLOCK_HEADS, ...) of one part; with dgain_ptr those are all its heads."""
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_HALF)
    mask_m, mask_d = offs_m < M, offs_d < HALF
    mask = mask_m[:, None] & mask_d[None, :]
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    if ROTATED:
        position = (offs_m % num_positions)[:, None]
        cos1, cos2 = _load_halves(cos_ptr, position * stride_cos + offs_d[None, :], HALF, mask, 0.0)
        sin1, sin2 = _load_halves(sin_ptr, position * stride_sin + offs_d[None, :], HALF, mask, 0.0)
    if gain_ptr is not None:
        gain1, gain2 = _load_halves(gain_ptr, offs_d, HALF, mask_d, 0.0)
    if dgain_ptr is not None:
        dgain1, dgain2 = tl.zeros([BLOCK_HALF], tl.float32), tl.zeros([BLOCK_HALF], tl.float32)
    first_head = block * BLOCK_HEADS
    for head in range(first_head, tl.minimum(first_head + BLOCK_HEADS, num_heads)):
        channel = head * 2 * HALF + offs_d
        d1, d2 = _load_halves(dy_ptr, offs_m[:, None] * stride_dym + channel[None, :], HALF, mask, 0.0)
        if ROTATED:
            d1, d2 = d1 * cos1 + d2 * sin2, d2 * cos2 - d1 * sin1
        if gain_ptr is not None or dscale_ptr is not None:
            x1, x2 = _load_halves(x_ptr, offs_m[:, None] * stride_xm + channel[None, :], HALF, mask, 0.0)
        if scale_ptr is not None:
            scale1, scale2 = _load_halves(scale_ptr, channel, HALF, mask_d, 0.0)
        if gain_ptr is not None:
            n1, n2 = x1, x2
            if scale_ptr is not None:
                n1, n2 = _rounded(x1 * scale1[None, :], dtype), _rounded(x2 * scale2[None, :], dtype)
            rstd = _head_rstd(n1, n2, mask_m, HALF, eps)
            n1, n2 = n1 * rstd, n2 * rstd
            if dgain_ptr is not None:
                dgain1 += tl.sum(d1 * n1, axis=0)
                dgain2 += tl.sum(d2 * n2, axis=0)
            d1, d2 = d1 * gain1[None, :], d2 * gain2[None, :]
            mean = ((tl.sum(d1 * n1, axis=1) + tl.sum(d2 * n2, axis=1)) / (2 * HALF))[:, None]
            d1, d2 = (d1 - n1 * mean) * rstd, (d2 - n2 * mean) * rstd
        if dscale_ptr is not None:
            row = dscale_ptr + pid_m * stride_partial + channel
            tl.store(row, tl.sum(d1 * x1, axis=0), mask=mask_d)
            tl.store(row + HALF, tl.sum(d2 * x2, axis=0), mask=mask_d)
        if scale_ptr is not None:
            d1, d2 = d1 * scale1[None, :], d2 * scale2[None, :]
        dx = dx_ptr + offs_m[:, None] * stride_dxm + channel[None, :]
        tl.store(dx, d1.to(dtype), mask=mask)
        tl.store(dx + HALF, d2.to(dtype), mask=mask)
    if dgain_ptr is not None:
        row = dgain_ptr + pid_m * stride_partial + offs_d
        tl.store(row, dgain1, mask=mask_d)
        tl.store(row + HALF, dgain2, mask=mask_d)


@triton.jit(do_not_specialize=["num_q_heads", "num_k_heads", "num_v_heads", "num_q_blocks", "num_k_blocks"])
def _rotary_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, q_ptr, k_ptr, v_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr,
    q_gain_ptr, k_gain_ptr, v_gain_ptr, q_out_ptr, k_out_ptr, v_out_ptr, dq_scale_ptr, dk_scale_ptr, dv_scale_ptr,
    dq_gain_ptr, dk_gain_ptr, dv_gain_ptr, num_q_heads, num_k_heads, num_v_heads, num_q_blocks, num_k_blocks,
    stride_dqm, stride_dkm, stride_dvm, stride_qm, stride_km, stride_vm, stride_q_outm, stride_k_outm, stride_v_outm,
    cos_ptr, sin_ptr, M, HALF, num_positions, stride_cos, stride_sin, stride_partial, eps,
    Q_ROTATED: tl.constexpr, K_ROTATED: tl.constexpr, V_ROTATED: tl.constexpr, Q_BLOCK_HEADS: tl.constexpr,
    K_BLOCK_HEADS: tl.constexpr, V_BLOCK_HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    if block < num_q_blocks:
        _transform_backward(
            dq_ptr, q_ptr, q_scale_ptr, q_gain_ptr, q_out_ptr, dq_scale_ptr, dq_gain_ptr, cos_ptr, sin_ptr,
            num_q_heads, stride_dqm, stride_qm, stride_q_outm, block,
            M, HALF, num_positions, stride_cos, stride_sin, stride_partial, eps,
            Q_ROTATED, BLOCK_M, Q_BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip
    elif block < num_q_blocks + num_k_blocks:
        if dk_ptr is not None:
            _transform_backward(
                dk_ptr, k_ptr, k_scale_ptr, k_gain_ptr, k_out_ptr, dk_scale_ptr, dk_gain_ptr, cos_ptr, sin_ptr,
                num_k_heads, stride_dkm, stride_km, stride_k_outm, block - num_q_blocks,
                M, HALF, num_positions, stride_cos, stride_sin, stride_partial, eps,
                K_ROTATED, BLOCK_M, K_BLOCK_HEADS, BLOCK_HALF,
            )  # fmt: skip
    elif dv_ptr is not None:
        _transform_backward(
            dv_ptr, v_ptr, v_scale_ptr, v_gain_ptr, v_out_ptr, dv_scale_ptr, dv_gain_ptr, cos_ptr, sin_ptr,
            num_v_heads, stride_dvm, stride_vm, stride_v_outm, block - num_q_blocks - num_k_blocks,
            M, HALF, num_positions, stride_cos, stride_sin, stride_partial, eps,
            V_ROTATED, BLOCK_M, V_BLOCK_HEADS, BLOCK_HALF,
        )  # fmt: skip


def _rows(x):
    """[..., width] as [M, width] without a copy."""
    return None if x is None else x.view(-1, x.shape[-1])


def _padded(values: Sequence, filler=None) -> list:
    return [*values, *[filler] * (MAX_PARTS - len(values))]


def _strides(matrices: Sequence) -> list[int]:
    return [0 if matrix is None else matrix.stride(0) for matrix in matrices]


def _angles(cos, sin, head_dim: int):
    """cos and sin as matrices, their length and strides; nothing where nothing is rotated."""
    if cos is None:
        return None, None, 1, 0, 0
    cos, sin = cos.reshape(-1, head_dim), sin.reshape(-1, head_dim)
    return cos, sin, cos.shape[0], cos.stride(0), sin.stride(0)


def _check(op: str, matrices: Sequence, parts: Sequence[Heads], cos, head_dim: int) -> None:
    """Raises ValueError for what one launch cannot take."""
    if not 1 <= len(parts) <= MAX_PARTS or len(matrices) != len(parts):
        raise ValueError(f"{op}: expected 1 to {MAX_PARTS} parts, got {len(matrices)} for {len(parts)}")
    shapes = [tuple(matrix.shape) for matrix in matrices]
    if len({shape[0] for shape in shapes}) > 1 or any(shape[1] % head_dim for shape in shapes):
        raise ValueError(f"{op}: expected matrices of as many rows and whole heads of {head_dim}, got {shapes}")
    if cos is None and any(part.rotated for part in parts):
        raise ValueError(f"{op}: expected cos and sin for parts that are rotated, got None")


def rotary(parts: Sequence[Heads], cos, sin, *, head_dim, eps=1e-6, outs=None, tile: Tile = DEFAULT_TILE) -> list:
    """Every part scaled, normed and rotated, in one launch; into `outs` where given (x itself for in place).

    parts: up to three, of as many rows. Every x and out [M or B, T, heads * head_dim]: unit column stride and rows at
    one stride, so columns of a stacked buffer. cos, sin [B or 1, T, head_dim] or [M or T, head_dim]: row m takes row m
    modulo their length; None where no part is rotated.

    Raises:
        ValueError: more than three parts, rows or heads that do not fit, cosines missing.
    """
    import torch

    outs = list(outs or [torch.empty_like(part.x, memory_format=torch.contiguous_format) for part in parts])
    xs, out_rows = [_rows(part.x) for part in parts], [_rows(out) for out in outs]
    _check("rotary", xs, parts, cos, head_dim)
    num_rows, half = xs[0].shape[0], head_dim // 2
    if not num_rows:
        return outs
    num_heads = _padded([x.shape[1] // head_dim for x in xs], 0)
    num_blocks = [cdiv(count, tile.block_n) for count in num_heads]
    cos, sin, num_positions, *angle_strides = _angles(cos, sin, head_dim)
    launch(
        _rotary_kernel, (cdiv(num_rows, tile.block_m), sum(num_blocks)), outs[0].device,
        *_padded(xs), *_padded([part.scale for part in parts]), *_padded([part.gain for part in parts]),
        *_padded(out_rows), *num_heads, *num_blocks[:2], *_strides(_padded(xs)), *_strides(_padded(out_rows)),
        cos, sin, num_rows, half, num_positions, *angle_strides, eps,
        *_padded([part.rotated for part in parts], False),
        BLOCK_M=tile.block_m, BLOCK_HEADS=tile.block_n, BLOCK_HALF=1 << (half - 1).bit_length(), **tile.options,
    )  # fmt: skip
    return outs


def rotary_backward(
    dys: Sequence, parts: Sequence[Heads], cos, sin, *, head_dim, eps=1e-6, need_dscale: Sequence[bool] = (False,) * 3,
    need_dgain: Sequence[bool] = (False,) * 3, outs=None, tile: Tile = DEFAULT_TILE,
) -> list[HeadsGrads]:  # fmt: skip
    """The gradients of every part: one launch, and one more to add the partial sums of dscale and dgain where asked.

    dys: one for each part, shaped as its x, any row stride; `outs` for dx where given (dy itself for in place); the
    rest as in `rotary`.

    Raises:
        ValueError: as `rotary`, or an x is missing that a gain or dscale needs.
    """
    import torch

    outs = list(outs or [torch.empty_like(dy, memory_format=torch.contiguous_format) for dy in dys])
    dy_rows, xs, out_rows = ([_rows(x) for x in xs] for xs in (dys, [part.x for part in parts], outs))
    _check("rotary_backward", dy_rows, parts, cos, head_dim)
    wanted = [
        (scaled and part.scale is not None, normed and part.gain is not None)
        for part, scaled, normed in zip(parts, need_dscale, need_dgain)
    ]
    if any(part.x is None and (part.gain is not None or scaled) for part, (scaled, _) in zip(parts, wanted)):
        raise ValueError("rotary_backward: expected x of every part with a gain or a trained scale, got None")
    num_rows, half = dy_rows[0].shape[0], head_dim // 2
    num_blocks_m = cdiv(num_rows, tile.block_m)
    params = [part.scale if scaled else None for part, (scaled, _) in zip(parts, wanted)]
    params += [part.gain if normed else None for part, (_, normed) in zip(parts, wanted)]
    widths = [0 if param is None else param.shape[0] for param in params]
    partial, columns = None, [None] * len(widths)
    if any(widths):
        partial = dys[0].new_empty(num_blocks_m, sum(widths), dtype=torch.float32)
        columns = [part if width else None for part, width in zip(partial.split(widths, dim=1), widths)]
    if num_rows:
        num_heads = _padded([dy.shape[1] // head_dim for dy in dy_rows], 0)
        block_heads = [
            1 << (count - 1).bit_length() if normed else tile.block_n
            for count, (_, normed) in zip(num_heads, _padded(wanted, (False, False)))
        ]
        num_blocks = [cdiv(count, block) for count, block in zip(num_heads, block_heads)]
        cos, sin, num_positions, *angle_strides = _angles(cos, sin, head_dim)
        launch(
            _rotary_backward_kernel, (num_blocks_m, sum(num_blocks)), outs[0].device,
            *_padded(dy_rows), *_padded(xs), *_padded([part.scale for part in parts]),
            *_padded([part.gain for part in parts]), *_padded(out_rows),
            *_padded(columns[: len(parts)]), *_padded(columns[len(parts) :]), *num_heads, *num_blocks[:2],
            *_strides(_padded(dy_rows)), *_strides(_padded(xs)), *_strides(_padded(out_rows)),
            cos, sin, num_rows, half, num_positions, *angle_strides, 0 if partial is None else partial.stride(0), eps,
            *_padded([part.rotated for part in parts], False), *block_heads,
            BLOCK_M=tile.block_m, BLOCK_HALF=1 << (half - 1).bit_length(), **tile.options,
        )  # fmt: skip
    grads = params
    if partial is not None:
        dtypes = {param.dtype for param in params if param is not None}
        summed = sum_partials(partial, dtypes.pop() if len(dtypes) == 1 else torch.float32).split(widths)
        grads = [None if param is None else part.to(param.dtype) for param, part in zip(params, summed)]
    return [HeadsGrads(*three) for three in zip(outs, grads[: len(parts)], grads[len(parts) :])]

"""h = prologue(x), and a = drop(h) D^T of all branches that share h (`shrink`).

    none:   h = x * l          rms_norm: h = gain * x * rstd * l, rstd = (mean(x^2) + eps)^-1/2
    swiglu: h = silu(gate) * up * l                         l: optional input scale (IA3); z = s f(a)

Every product is rounded to x's dtype where the torch provider rounds it; a is accumulated in float32. h is made at its
bytes, every element read and written once: rms_norm keeps whole rows in registers, the others need no row at all.
"""

import triton
import triton.language as tl

from mmpeft_kernels.launch import launch
from mmpeft_kernels.shrink import shrink
from mmpeft_kernels.tile import Tile, cdiv

PROLOGUES = ("none", "rms_norm", "swiglu")
# Widest row of rms_norm that one program keeps in registers, columns of a step beyond it, and values a thread.
MAX_WHOLE_ROW, _STEP, _VALUES = 8192, 1024, 16
_ELEMENTS = Tile(block_m=16, block_n=128, num_warps=8)


def warps_of_row(columns: int) -> int:
    """Warps of a program that holds a row of so many columns."""
    return min(8, max(1, columns // (32 * _VALUES)))


@triton.jit
def unscaled_h_tile(x_ptr, up_ptr, gain_ptr, rstd, offs_m, offs_k, M, K, stride_xm, stride_upm, PROLOGUE: tl.constexpr):
    """The prologue's result before its input scale, in x's dtype [BLOCK_M, BLOCK_K]; 0 outside [M, K]."""
    mask_k = offs_k < K
    mask = (offs_m < M)[:, None] & mask_k[None, :]
    h = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
    dtype = h.dtype
    if PROLOGUE == "rms_norm":
        gain = tl.load(gain_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        normalised = (h.to(tl.float32) * rstd[:, None]).to(dtype)
        h = (normalised.to(tl.float32) * gain[None, :]).to(dtype)
    elif PROLOGUE == "swiglu":
        up = tl.load(up_ptr + offs_m[:, None] * stride_upm + offs_k[None, :], mask=mask, other=0.0)
        gate = h.to(tl.float32)
        h = ((gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up.to(tl.float32)).to(dtype)
    return h


@triton.jit
def scaled_by(h, scale_ptr, offs_k, K):
    """h * l of columns `offs_k`, rounded to h's dtype; h itself without a scale."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        h = (h.to(tl.float32) * scale[None, :]).to(h.dtype)
    return h


@triton.jit
def scaled_row(h, scale_ptr, offs_k, K):
    """`scaled_by` of one row."""
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        h = (h.to(tl.float32) * scale).to(h.dtype)
    return h


@triton.jit
def _prologue_elements_kernel(
    x_ptr, up_ptr, in_scale_ptr, h_ptr, M, K, stride_xm, stride_upm, stride_hm,
    PROLOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h of the prologues that need no statistic of a row."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    h = unscaled_h_tile(x_ptr, up_ptr, None, None, offs_m, offs_k, M, K, stride_xm, stride_upm, PROLOGUE)
    h = scaled_by(h, in_scale_ptr, offs_k, K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    tl.store(h_ptr + offs_m[:, None] * stride_hm + offs_k[None, :], h, mask=mask)


@triton.jit
def _store_normalised(x, rstd, gain_ptr, in_scale_ptr, h_row_ptr, offs_k, K):
    mask = offs_k < K
    gain = tl.load(gain_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    normalised = (x.to(tl.float32) * rstd).to(x.dtype)
    h = scaled_row((normalised.to(tl.float32) * gain).to(x.dtype), in_scale_ptr, offs_k, K)
    tl.store(h_row_ptr + offs_k, h, mask=mask)


@triton.jit
def _prologue_rows_kernel(
    x_ptr, gain_ptr, in_scale_ptr, h_ptr, rstd_ptr, K, stride_xm, stride_hm, eps,
    IS_WHOLE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rms_norm of one row; from registers where BLOCK_K holds it all."""
    row = tl.program_id(0).to(tl.int64)
    if IS_WHOLE:
        offs_k = tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride_xm + offs_k, mask=offs_k < K, other=0.0)
        rstd = tl.rsqrt(tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=0) / K + eps)
        _store_normalised(x, rstd, gain_ptr, in_scale_ptr, h_ptr + row * stride_hm, offs_k, K)
    else:
        squares = tl.zeros([BLOCK_K], tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + row * stride_xm + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=0) / K + eps)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + row * stride_xm + offs_k, mask=offs_k < K, other=0.0)
            _store_normalised(x, rstd, gain_ptr, in_scale_ptr, h_ptr + row * stride_hm, offs_k, K)
    tl.store(rstd_ptr + row, rstd)


def prologue(
    x, up=None, *, name="none", gain=None, eps=1e-6, in_scale=None, down=None, activation="identity",
    z_scaling=1.0, p=0.0, seed=None, stream=0, write_h=True, h_out=None, a_out=None, z_out=None,
    tile: Tile | None = None,
):  # fmt: skip
    """The prologue of a fused linear, with the shrink of every branch on one mask.

    x [M, K] with unit column stride, or gate with `up` [M, K] for swiglu; gain, in_scale [K], any float dtype;
    down [R, K], the branches' down projections stacked, any float dtype; p, seed, stream: their dropout. Results go to
    h_out [M, K], a_out and z_out [M, R] where given: x's dtype, unit column stride, any row stride, so that h and z may
    be columns of one buffer.

    Returns (h or None, rstd [M] float32 or None, a or None, z = z_scaling f(a) or None). Unless an output is given for
    it, h is None with `write_h=False` and x itself where the prologue changes nothing, and z is a where they are equal.
    tile: of the shrink.
    """
    import torch

    num_rows, rank = x.shape[0], 0 if down is None else down.shape[0]
    changed = name != "none" or in_scale is not None
    rstd = x.new_empty(num_rows, dtype=torch.float32) if name == "rms_norm" else None
    h = h_out
    if h is None:
        h = torch.empty_like(x, memory_format=torch.contiguous_format) if changed else x
    if num_rows and h is not x:
        _make_h(x, up, gain, in_scale, h, rstd, name=name, eps=eps)
    a = z = None
    if rank:
        options = {"activation": activation, "z_scaling": z_scaling, "p": p, "seed": seed, "stream": stream}
        a, z = shrink(h, down, a_out=a_out, z_out=z_out, tile=tile, **options)
    return (h if write_h or h_out is not None else None), rstd, a, z


def _make_h(x, up, gain, in_scale, h, rstd, *, name: str, eps: float) -> None:
    num_rows, width = x.shape
    if name == "rms_norm":
        is_whole = width <= MAX_WHOLE_ROW
        block_k = max(16, 1 << (width - 1).bit_length()) if is_whole else _STEP
        launch(
            _prologue_rows_kernel, (num_rows,), x.device,
            x, gain, in_scale, h, rstd, width, x.stride(0), h.stride(0), eps,
            IS_WHOLE=is_whole, BLOCK_K=block_k, num_warps=warps_of_row(block_k), num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        return
    tile = _ELEMENTS
    launch(
        _prologue_elements_kernel, (cdiv(num_rows, tile.block_m), cdiv(width, tile.block_n)), x.device,
        x, up, in_scale, h, num_rows, width, x.stride(0), up.stride(0) if up is not None else 0, h.stride(0),
        PROLOGUE=name, BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, **tile.options,
    )  # fmt: skip

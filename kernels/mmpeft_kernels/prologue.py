"""h = prologue(x) and a = drop(h) D^T of all branches that share h, from one pass over x (two for rms_norm).

    none:   h = x * l          rms_norm: h = gain * x * rstd * l, rstd = (mean(x^2) + eps)^-1/2
    swiglu: h = silu(gate) * up * l                         l: optional input scale (IA3); z = s f(a)

Every product is rounded to x's dtype where the torch provider rounds it; a is accumulated in float32.
"""

import triton
import triton.language as tl

from mmpeft_kernels.activations import activate
from mmpeft_kernels.dropout import dropped_tile, inverse_keep_of, threshold_of
from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import Tile, architecture, cdiv, padded_rank

PROLOGUES = ("none", "rms_norm", "swiglu")
# One block of ranks keeps its float32 accumulator in registers; beyond it x is read once more for each block.
MAX_BLOCK_R = 256


def default_tile(rank: int, itemsize: int, arch: int | str, *, wide: bool = False) -> Tile:
    """Blocks for `rank` columns of a (0 for none): of few rows, so that 2800 rows are a program for every
    multiprocessor, and deep ones; eight warps where four cannot hold the accumulator. Fastest on an H200 over the calls
    of a layer, at ranks 16 to 128 and 4096 and 8192 rows; AMD's is unmeasured. wide: D is float32 under narrower
    operands and taken half as deep, as many bytes a step: deeper ones spill."""
    if rank == 0:
        return Tile(block_m=4, block_n=1024, num_warps=4)
    if itemsize > 2:
        return Tile(block_m=16, block_n=32, num_warps=8, num_stages=2)
    high = padded_rank(rank) > 128
    num_warps = 8 if high else 4
    if isinstance(arch, str):  # 64 KiB of shared memory
        return Tile(block_m=32, block_n=64, num_warps=num_warps, num_stages=2)
    return Tile(block_m=32 if high else 16, block_n=64 if wide else 128, num_warps=num_warps, num_stages=2)


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


@triton.jit(do_not_specialize=["stream", "threshold"])
def _prologue_kernel(
    x_ptr, up_ptr, gain_ptr, in_scale_ptr, down_ptr, seed_ptr, h_ptr, rstd_ptr, a_ptr, z_ptr,
    M, K, R, stride_xm, stride_upm, stride_dr, stride_hm, stride_am, stride_zm,
    eps, inverse_keep, z_scaling, stream, threshold,
    PROLOGUE: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_r = tl.program_id(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M

    # Phase 1: the row statistic.
    rstd = tl.zeros([BLOCK_M], tl.float32)
    if PROLOGUE == "rms_norm":
        squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask = mask_m[:, None] & (offs_k < K)[None, :]
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += x * x
        rstd = tl.rsqrt(tl.sum(squares, axis=1) / K + eps)
        if pid_r == 0:
            tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    # Phase 2: h, and its product with the stacked down projections while it is in registers.
    if down_ptr is not None:
        offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        h = unscaled_h_tile(x_ptr, up_ptr, gain_ptr, rstd, offs_m, offs_k, M, K, stride_xm, stride_upm, PROLOGUE)
        h = scaled_by(h, in_scale_ptr, offs_k, K)
        if h_ptr is not None:  # noqa: SIM102 - known when compiled; the next is not
            if pid_r == 0:
                tl.store(
                    h_ptr + offs_m[:, None] * stride_hm + offs_k[None, :], h, mask=mask_m[:, None] & mask_k[None, :]
                )
        if down_ptr is not None:
            if seed_ptr is not None:
                h = tl.where(dropped_tile(seed, stream, threshold, offs_m, k, BLOCK_K), 0.0, h)
            down = tl.load(
                down_ptr + offs_r[:, None] * stride_dr + offs_k[None, :],
                mask=mask_r[:, None] & mask_k[None, :],
                other=0.0,
            )
            acc = tl.dot(h, down.to(h.dtype).T, acc, input_precision="ieee")

    # Phase 3: what the up projections and the backward need.
    if down_ptr is not None:
        a = (acc * inverse_keep).to(a_ptr.dtype.element_ty)
        mask = mask_m[:, None] & mask_r[None, :]
        tl.store(a_ptr + offs_m[:, None] * stride_am + offs_r[None, :], a, mask=mask)
        if z_ptr is not None:
            z = (activate(a.to(tl.float32), ACTIVATION) * z_scaling).to(a.dtype)
            tl.store(z_ptr + offs_m[:, None] * stride_zm + offs_r[None, :], z, mask=mask)


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
    """
    import torch

    num_rows, width = x.shape
    rank = 0 if down is None else down.shape[0]
    changed = name != "none" or in_scale is not None
    h, z = h_out, z_out if rank else None
    if h is None and write_h and changed:
        h = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty(num_rows, dtype=torch.float32) if name == "rms_norm" else None
    a = (x.new_empty(num_rows, rank) if a_out is None else a_out) if rank else None
    if z is None and rank and (activation != "identity" or z_scaling != 1.0):
        z = x.new_empty(num_rows, rank)
    if num_rows and (changed or rank or h is not None):
        block_r = padded_rank(rank, MAX_BLOCK_R) if rank else 16

        def attempt(tile: Tile) -> None:
            launch(
                _prologue_kernel, (cdiv(num_rows, tile.block_m), cdiv(max(rank, 1), block_r)), x.device,
                x, up, gain, in_scale, down, seed if p > 0.0 else None, h, rstd, a, z,
                num_rows, width, rank, x.stride(0), up.stride(0) if up is not None else 0,
                down.stride(0) if rank else 0, 0 if h is None else h.stride(0), a.stride(0) if rank else 0,
                0 if z is None else z.stride(0), eps, inverse_keep_of(p), z_scaling, stream, threshold_of(p),
                PROLOGUE=name, ACTIVATION=activation, BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=block_r,
                **tile.options,
            )  # fmt: skip

        arch, itemsize = architecture(x.device), x.element_size()
        wide = rank > 0 and down.element_size() > itemsize
        footprint = Footprint("prologue", arch, itemsize, block_r if rank else 0, name, wide=wide)
        fitted(footprint, tile or default_tile(rank, itemsize, arch, wide=wide), x.device, attempt)
    return (x if write_h and h is None else h), rstd, a, (a if z is None else z)

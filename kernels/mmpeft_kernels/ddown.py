"""dD = da^T drop(h) [R, K] for all branches that share h and its mask; h is given, or recomputed from the prologue's x.

Split over chunks of rows, whose partial sums are added in a fixed order.
"""

import triton
import triton.language as tl

from mmpeft_kernels.dropout import dropped_tile, inverse_keep_of, threshold_of
from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.prologue import scaled_by, unscaled_h_tile
from mmpeft_kernels.reduction import sum_partials
from mmpeft_kernels.row_chunks import num_multiprocessors, rows_per_chunk
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import Tile, architecture, cdiv, padded_rank

# Ranks of one program; beyond it h is recomputed once more for each block.
MAX_BLOCK_R = 128


def default_tile(rank: int, itemsize: int, arch: int | str) -> Tile:
    """Blocks for `rank` rows of dD: wide while the accumulator is low. Fastest on an H200 over the calls of a layer, at
    ranks 16 and 128; AMD's is unmeasured."""
    if itemsize > 2:
        return Tile(block_m=16, block_n=64 if padded_rank(rank) <= 64 else 32, num_warps=4, num_stages=2)
    if isinstance(arch, str):
        return Tile(block_m=32, block_n=128, num_warps=8, num_stages=2)
    if padded_rank(rank) <= 64:
        return Tile(block_m=32, block_n=256, num_warps=8, num_stages=2)
    return Tile(block_m=64, block_n=64, num_warps=4, num_stages=2)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _ddown_kernel(
    da_ptr, x_ptr, up_ptr, gain_ptr, rstd_ptr, in_scale_ptr, seed_ptr, out_ptr,
    M, K, R, rows_per_chunk, stride_dam, stride_xm, stride_upm, stream, threshold,
    PROLOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_k, pid_chunk, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    start = pid_chunk * rows_per_chunk
    for row in range(start, tl.minimum(start + rows_per_chunk, M), BLOCK_M):
        offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        rstd = tl.zeros([BLOCK_M], tl.float32)
        if PROLOGUE == "rms_norm":
            rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        h = unscaled_h_tile(x_ptr, up_ptr, gain_ptr, rstd, offs_m, offs_k, M, K, stride_xm, stride_upm, PROLOGUE)
        h = scaled_by(h, in_scale_ptr, offs_k, K)
        if seed_ptr is not None:
            h = tl.where(dropped_tile(seed, stream, threshold, offs_m, pid_k * BLOCK_K, BLOCK_K), 0.0, h)
        mask = mask_m[:, None] & mask_r[None, :]
        da = tl.load(da_ptr + offs_m[:, None] * stride_dam + offs_r[None, :], mask=mask, other=0.0)
        acc = tl.dot(da.T, h, acc, input_precision="ieee")
    out = out_ptr + (pid_chunk.to(tl.int64) * R + offs_r)[:, None] * K + offs_k[None, :]
    tl.store(out, acc, mask=mask_r[:, None] & (offs_k < K)[None, :])


def ddown(
    da, x, up=None, *, out_dtype, name="none", gain=None, rstd=None, in_scale=None, p=0.0, seed=None, stream=0,
    tile: Tile | None = None,
):  # fmt: skip
    """dD [R, K] in `out_dtype`. da [M, R] and x [M, K] of one dtype with unit column stride; x is h itself with
    name="none" and no in_scale, else the prologue's arguments as in `prologue`, rstd [M] from it; p, seed, stream: of
    the dropout mask."""
    import torch

    (num_rows, width), rank = x.shape, da.shape[1]
    block_r = padded_rank(rank, MAX_BLOCK_R)

    def attempt(tile: Tile):
        num_blocks_k, num_blocks_r = cdiv(width, tile.block_n), cdiv(rank, block_r)
        chunk = rows_per_chunk(num_rows, tile.block_m, num_blocks_k * num_blocks_r, num_multiprocessors(x.device))
        partial = x.new_empty(cdiv(num_rows, chunk), rank, width, dtype=torch.float32)
        if num_rows:
            launch(
                _ddown_kernel, (num_blocks_k, partial.shape[0], num_blocks_r), x.device,
                da, x, up, gain, rstd, in_scale, seed if p > 0.0 else None, partial,
                num_rows, width, rank, chunk, da.stride(0), x.stride(0), 0 if up is None else up.stride(0),
                stream, threshold_of(p),
                PROLOGUE=name, BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=block_r, **tile.options,
            )  # fmt: skip
        return partial

    arch, itemsize = architecture(x.device), x.element_size()
    footprint = Footprint("ddown", arch, itemsize, block_r, name)
    partial = fitted(footprint, tile or default_tile(rank, itemsize, arch), x.device, attempt)
    return sum_partials(partial, out_dtype, scaling=inverse_keep_of(p))

"""a = drop(h) D^T / keep of all branches that share h, and z = s f(a): a GEMM with few columns and a masked operand.

The mask is drawn in registers on its way into the product. Rows alone are too few programs for a GPU, so the depth is
split; partial sums are added in a fixed order.
"""

import triton
import triton.language as tl

from mmpeft_kernels.activations import activate
from mmpeft_kernels.dropout import dropped_tile, inverse_keep_of, threshold_of
from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.row_chunks import num_multiprocessors
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import Tile, architecture, cdiv, padded_rank

# Ranks of one accumulator; beyond them h is read, and its mask drawn, once more for each block.
MAX_BLOCK_R = 256
# Steps below which a split saves nothing.
_LEAST_STEPS = 4
_FINISH = Tile(block_m=16, block_n=64)


def default_tile(rank: int, itemsize: int, arch: int | str) -> Tile:
    """block_n: depth of a step. Every block of rows reads D again, so Hopper's are high where D has many ranks; there
    the product is a warpgroup's."""
    if itemsize > 2:
        return Tile(block_m=16, block_n=32, num_warps=8, num_stages=2)
    block_r = padded_rank(rank, MAX_BLOCK_R)
    num_warps = 8 if block_r > 128 else 4
    if isinstance(arch, str):  # 64 KiB of shared memory
        return Tile(block_m=32, block_n=64, num_warps=num_warps, num_stages=2)
    if arch >= 90 and block_r >= 128:
        return Tile(block_m=128, block_n=64, num_warps=8, num_stages=3)
    # Ampere's products of 4 warps take a few registers more than there are at some ranks.
    return Tile(block_m=64, block_n=64, num_warps=num_warps if arch >= 90 else 8, num_stages=3)


@triton.jit
def _store_a(acc, a_ptr, z_ptr, offs_m, offs_r, mask, stride_am, stride_zm, z_scaling, ACTIVATION: tl.constexpr):
    a = acc.to(a_ptr.dtype.element_ty)
    tl.store(a_ptr + offs_m[:, None] * stride_am + offs_r[None, :], a, mask=mask)
    if z_ptr is not None:
        z = (activate(a.to(tl.float32), ACTIVATION) * z_scaling).to(a.dtype)
        tl.store(z_ptr + offs_m[:, None] * stride_zm + offs_r[None, :], z, mask=mask)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _shrink_kernel(
    h_ptr, down_ptr, seed_ptr, partial_ptr, a_ptr, z_ptr,
    M, K, R, span, stride_hm, stride_dr, stride_am, stride_zm, inverse_keep, z_scaling, stream, threshold,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_s = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    first_k = tl.program_id(2) * span
    for k in range(first_k, min(K, first_k + span), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        h = tl.load(
            h_ptr + offs_m[:, None] * stride_hm + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0
        )
        if seed_ptr is not None:
            h = tl.where(dropped_tile(seed, stream, threshold, offs_m, k, BLOCK_K), 0.0, h)
        down = tl.load(
            down_ptr + offs_r[:, None] * stride_dr + offs_k[None, :], mask=mask_r[:, None] & mask_k[None, :], other=0.0
        )
        acc = tl.dot(h, down.T, acc, input_precision="ieee")
    acc *= inverse_keep
    mask = mask_m[:, None] & mask_r[None, :]
    if partial_ptr is not None:
        tl.store(partial_ptr + (pid_s * M + offs_m[:, None]) * R + offs_r[None, :], acc, mask=mask)
    else:
        _store_a(acc, a_ptr, z_ptr, offs_m, offs_r, mask, stride_am, stride_zm, z_scaling, ACTIVATION)


@triton.jit
def _shrink_finish_kernel(
    partial_ptr, a_ptr, z_ptr, M, R, S, stride_am, stride_zm, z_scaling,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    part = partial_ptr + offs_m[:, None] * R + offs_r[None, :]
    for _ in range(0, S):
        acc += tl.load(part, mask=mask, other=0.0)
        part += M.to(tl.int64) * R
    _store_a(acc, a_ptr, z_ptr, offs_m, offs_r, mask, stride_am, stride_zm, z_scaling, ACTIVATION)


def num_splits(num_programs: int, depth: int, block_k: int, multiprocessors: int) -> int:
    """Into how many parts the depth is cut, so that `num_programs` of them fill the GPU."""
    most = max(1, depth // (_LEAST_STEPS * block_k))
    return min(most, max(1, multiprocessors // num_programs))


def shrink(
    h, down, *, activation="identity", z_scaling=1.0, p=0.0, seed=None, stream=0, a_out=None, z_out=None,
    tile: Tile | None = None,
):  # fmt: skip
    """a = drop(h) D^T / keep [M, R] and z = z_scaling f(a) [M, R], in h's dtype; z is a where they are equal and no
    z_out is given.

    h [M, K] with unit column stride; down [R, K], the branches' down projections stacked, any float dtype; p, seed,
    stream: their dropout. a_out, z_out: where given, any row stride (columns of a wider buffer, say).
    """
    import torch

    num_rows, depth = h.shape
    # Every block of rows reads D again: a wider one is cast once, not by each.
    down, rank = down.to(h.dtype), down.shape[0]
    a = h.new_empty(num_rows, rank) if a_out is None else a_out
    z = z_out
    if z is None and (activation != "identity" or z_scaling != 1.0):
        z = h.new_empty(num_rows, rank)
    if not num_rows or not rank:
        return a, (a if z is None else z)
    block_r = padded_rank(rank, MAX_BLOCK_R)
    outputs = (a.stride(0), 0 if z is None else z.stride(0))

    def attempt(tile: Tile) -> None:
        blocks = cdiv(num_rows, tile.block_m), cdiv(rank, block_r)
        splits = num_splits(blocks[0] * blocks[1], depth, tile.block_n, num_multiprocessors(h.device))
        span = cdiv(cdiv(depth, splits), tile.block_n) * tile.block_n
        splits = cdiv(depth, span)
        partial = h.new_empty(splits, num_rows, rank, dtype=torch.float32) if splits > 1 else None
        launch(
            _shrink_kernel, (*blocks, splits), h.device,
            h, down, seed if p > 0.0 else None, partial, a, z, num_rows, depth, rank, span, h.stride(0),
            down.stride(0), *outputs, inverse_keep_of(p), z_scaling, stream, threshold_of(p),
            ACTIVATION=activation, BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=block_r, **tile.options,
        )  # fmt: skip
        if partial is not None:
            launch(
                _shrink_finish_kernel, (cdiv(num_rows, _FINISH.block_m), cdiv(rank, _FINISH.block_n)), h.device,
                partial, a, z, num_rows, rank, splits, *outputs, z_scaling,
                ACTIVATION=activation, BLOCK_M=_FINISH.block_m, BLOCK_R=_FINISH.block_n, **_FINISH.options,
            )  # fmt: skip

    arch, itemsize = architecture(h.device), h.element_size()
    footprint = Footprint("shrink", arch, itemsize, block_r)
    fitted(footprint, tile or default_tile(rank, itemsize, arch), h.device, attempt)
    return a, (a if z is None else z)

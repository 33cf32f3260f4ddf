"""What the branches of a stacked weight need from dy, for all segments in one pass over it.

    a = D drop(h), z = f(a):   da = s (dy_i U_i) * f'(a)  [M, R],   dU_i = s dy_i^T z  [N, R]

A program owns a column tile and a chunk of rows. A second launch adds the partial sums over column tiles (da) and over
chunks (dU) in a fixed order: no atomics. The partials of da cost M R N / block_n values, so a large R is better off
with two GEMMs.
"""

from collections.abc import Sequence
from math import gcd

import triton
import triton.language as tl

from mmpeft_kernels.activations import activate, activation_derivative
from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.reduction import DEFAULT_TILE as SUM_TILE
from mmpeft_kernels.reduction import sum_block
from mmpeft_kernels.row_chunks import num_multiprocessors, rows_per_chunk
from mmpeft_kernels.segments import SegmentShape, check_segments, column_tiles, segment_tiles
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import Tile, architecture, cdiv, padded_rank

# Ranks of one program; beyond it dy is read once more for each block.
MAX_BLOCK_R = 128
_FINISH_TILE = Tile(block_m=32, block_n=32)


def default_tile(rank: int, itemsize: int, arch: int | str, *, wide: bool = False) -> Tile:
    """Blocks for branches of `rank`, whose accumulators [block_n, rank] and [block_m, rank] stay in registers. Fastest
    on an H200 at ranks 16 and 128; AMD's is unmeasured. wide: U is float32 under narrower operands."""
    if itemsize > 2:
        return Tile(block_m=16, block_n=64 if padded_rank(rank) <= 64 else 32, num_warps=4, num_stages=2)
    if isinstance(arch, str):  # 64 threads a warp, 64 KiB of shared memory
        block_n = 256 if padded_rank(rank) <= 32 else 128
        return Tile(block_m=64, block_n=block_n, num_warps=4 if padded_rank(rank) > 64 else 8, num_stages=2)
    if padded_rank(rank) <= 32:
        return Tile(block_m=128, block_n=256, num_warps=8, num_stages=3)
    # Before Hopper products take their operands from registers, where one more stage or a wide U's cast is too much.
    return Tile(block_m=64, block_n=64 if wide and arch < 90 else 128, num_warps=8, num_stages=3 if arch >= 90 else 2)


@triton.jit
def _dy_pass_kernel(
    dy_ptr, a_ptr, u_ptr, tiles_ptr, dz_ptr, du_ptr, M, N, R, rows_per_chunk, stride_dym, stride_am, stride_u,
    ACTIVATION: tl.constexpr, COL_MULTIPLE: tl.constexpr, RANK_MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_n, pid_chunk, pid_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # Values from memory are opaque to the compiler: without the hints their blocks are not loaded as vectors.
    first_col = tl.multiple_of(tl.load(tiles_ptr + pid_n * 4), COL_MULTIPLE)
    end_col = tl.multiple_of(tl.load(tiles_ptr + pid_n * 4 + 1), COL_MULTIPLE)
    first_rank = tl.multiple_of(tl.load(tiles_ptr + pid_n * 4 + 2), RANK_MULTIPLE)
    num_ranks = tl.multiple_of(tl.load(tiles_ptr + pid_n * 4 + 3), RANK_MULTIPLE) - first_rank
    offs_n = first_col + tl.arange(0, BLOCK_N)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < end_col, offs_r < num_ranks
    dtype = dy_ptr.dtype.element_ty

    # Phase 1: the rows of this chunk; a segment without a branch has none to visit.
    if dz_ptr is not None:
        u_mask = mask_n[:, None] & mask_r[None, :]
        u = tl.load(u_ptr + offs_n[:, None] * stride_u + offs_r[None, :], mask=u_mask, other=0.0).to(dtype)
    du = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    start = pid_chunk * rows_per_chunk
    end = tl.where(pid_r * BLOCK_R < num_ranks, tl.minimum(start + rows_per_chunk, M), start)
    for row in range(start, end, BLOCK_M):
        offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        dy_mask = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=dy_mask, other=0.0)
        mask = mask_m[:, None] & mask_r[None, :]
        if dz_ptr is not None:
            dz = tl.dot(dy, u, input_precision="ieee")
            tl.store(dz_ptr + (pid_n.to(tl.int64) * M + offs_m)[:, None] * R + offs_r[None, :], dz, mask=mask)
        if du_ptr is not None:
            a = tl.load(a_ptr + offs_m[:, None] * stride_am + (first_rank + offs_r)[None, :], mask=mask, other=0.0)
            z = activate(a.to(tl.float32), ACTIVATION).to(dtype)
            du = tl.dot(dy.T, z, du, input_precision="ieee")

    # Phase 2: this chunk's share of dU; ranks that the segment does not have get zeros.
    if du_ptr is not None:
        out = du_ptr + (pid_chunk.to(tl.int64) * N + offs_n)[:, None] * R + offs_r[None, :]
        tl.store(out, du, mask=mask_n[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["num_segments", "num_blocks_r", "num_da_programs", "num_chunks"])
def _finish_kernel(
    dz_ptr, a_ptr, segments_ptr, da_ptr, du_partial_ptr, du_ptr,
    M, R, num_segments, num_blocks_r, num_da_programs, num_chunks, du_size, stride_am, stride_dam, scaling,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first programs finish da, s f'(a) times the sum over a segment's column tiles; the others sum dU's chunks."""
    pid = tl.program_id(0)
    if pid < num_da_programs:
        if dz_ptr is not None:
            entry = segments_ptr + pid // num_blocks_r % num_segments * 4
            first_tile, end_tile = tl.load(entry), tl.load(entry + 1)
            first_rank, end_rank = tl.load(entry + 2), tl.load(entry + 3)
            offs_m = (pid // (num_blocks_r * num_segments)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            offs_r = pid % num_blocks_r * BLOCK_R + tl.arange(0, BLOCK_R)
            mask = (offs_m < M)[:, None] & (first_rank + offs_r < end_rank)[None, :]
            dz = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for tile_idx in range(first_tile, end_tile):
                rows = tl.cast(tile_idx, tl.int64) * M + offs_m
                dz += tl.load(dz_ptr + rows[:, None] * R + offs_r[None, :], mask=mask, other=0.0)
            columns = (first_rank + offs_r)[None, :]
            da = (dz * scaling).to(da_ptr.dtype.element_ty)
            if ACTIVATION != "identity":
                a = tl.load(a_ptr + offs_m[:, None] * stride_am + columns, mask=mask, other=0.0).to(tl.float32)
                da = (da.to(tl.float32) * activation_derivative(a, ACTIVATION)).to(da.dtype)
            tl.store(da_ptr + offs_m[:, None] * stride_dam + columns, da, mask=mask)
    elif du_ptr is not None:
        sum_block(du_partial_ptr, du_ptr, pid - num_da_programs, num_chunks, du_size, scaling, BLOCK_S, BLOCK_N)


def dy_pass(
    dy, a, u, *, segments: Sequence[SegmentShape], scaling=1.0, activation="identity", need_da=True, need_du=True,
    tile: Tile | None = None,
):  # fmt: skip
    """(da [M, sum of ranks] in dy's dtype or None, dU [N, R] in u's dtype or None, each only where asked).

    dy [M, N] and a [M, sum of ranks] of one dtype, u [N, R] of any float dtype, R at least the largest rank; unit
    column strides. segments: columns and ranks in order. dU is 0 in the columns beyond a segment's rank.

    Raises:
        ValueError: segments do not make up the shapes.
    """
    import torch

    (num_rows, num_out), width = dy.shape, u.shape[1]
    segments = tuple(segments)
    check_segments("dy_pass", segments, num_out, a.shape[1])
    largest = max(segment.rank for segment in segments)
    block_r = padded_rank(largest or 1, MAX_BLOCK_R)
    num_blocks = cdiv(width, block_r)
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if need_da else None
    finished_du = torch.empty_like(u, memory_format=torch.contiguous_format) if need_du else None

    def attempt(tile: Tile) -> None:
        tiles = column_tiles(segments, tile.block_n, dy.device)
        chunk = rows_per_chunk(num_rows, tile.block_m, tiles.shape[0] * num_blocks, num_multiprocessors(dy.device))
        num_chunks = cdiv(num_rows, chunk)
        dz = dy.new_empty(tiles.shape[0], num_rows, width, dtype=torch.float32) if need_da else None
        du = dy.new_empty(num_chunks, num_out, width, dtype=torch.float32) if need_du else None
        if num_rows and width and (need_da or need_du):
            launch(
                _dy_pass_kernel, (tiles.shape[0], num_chunks, num_blocks), dy.device,
                dy, a, u, tiles, dz, du, num_rows, num_out, width, chunk, dy.stride(0), a.stride(0), u.stride(0),
                ACTIVATION=activation, COL_MULTIPLE=gcd(16, *(segment.num_out for segment in segments)),
                RANK_MULTIPLE=gcd(16, *(segment.rank for segment in segments)),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block_r, **tile.options,
            )  # fmt: skip
        finish(tile, dz, du, num_chunks)

    def finish(tile: Tile, dz, du, num_chunks: int) -> None:
        blocks_r = cdiv(max(1, largest), _FINISH_TILE.block_n)
        num_da_programs = cdiv(num_rows, _FINISH_TILE.block_m) * len(segments) * blocks_r if need_da and largest else 0
        num_du_programs = cdiv(u.numel(), SUM_TILE.block_n) if need_du else 0
        if num_da_programs + num_du_programs:
            launch(
                _finish_kernel, (num_da_programs + num_du_programs,), dy.device,
                dz, a, segment_tiles(segments, tile.block_n, dy.device), da, du, finished_du,
                num_rows, width, len(segments), blocks_r, num_da_programs, num_chunks, u.numel(),
                a.stride(0), da.stride(0) if need_da else 0, scaling,
                ACTIVATION=activation, BLOCK_M=_FINISH_TILE.block_m, BLOCK_R=_FINISH_TILE.block_n,
                BLOCK_S=SUM_TILE.block_m, BLOCK_N=SUM_TILE.block_n, **_FINISH_TILE.options,
            )  # fmt: skip

    arch, itemsize = architecture(dy.device), dy.element_size()
    wide = u.element_size() > itemsize
    footprint = Footprint("dy_pass", arch, itemsize, block_r, wide=wide)
    fitted(footprint, tile or default_tile(largest, itemsize, arch, wide=wide), dy.device, attempt)
    return da, finished_du

"""A GEMM whose accumulator also takes a low-rank product: out = (s z U + x W (+ bias)) (* scale) (+ residual).

Forward (transposed operands): x = h, W = weight [N, K], U = up [N, R] block-diagonal over the segments of a stacked
weight. Backward: x = dy, W = weight [K, N] as it lies, z = da, U = down [R, N], s = 1 / keep, and the branches' dropout
mask on the low-rank product, whose columns are the branches' inputs. Persistent programs in grouped order; the low-rank
steps come first, so that s and the mask are applied in the accumulator; tensor descriptors (TMA) for x and W where
`tile.use_tma`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import triton
import triton.language as tl

from mmpeft_kernels.dropout import dropped_tile, inverse_keep_of, threshold_of
from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.row_chunks import num_multiprocessors
from mmpeft_kernels.segments import SegmentShape, check_segments, column_tiles
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import Tile, architecture, cdiv, padded_rank

# Rows of tiles that run side by side and share their columns of W in L2.
GROUP_M = 8


@dataclass(frozen=True, kw_only=True)
class GemmTile(Tile):
    """block_k: depth of a step. use_tma: x, W, residual and out go through tensor descriptors: 16-byte aligned
    rows, and every segment but the last made of whole tiles."""

    block_k: int
    use_tma: bool = False


def default_tile(arch: int | str, itemsize: int, *, use_tma: bool = True) -> GemmTile:
    """The tile for `tile.architecture` and elements of `itemsize` bytes; use_tma=False where the operands cannot take
    tensor descriptors."""
    if itemsize > 2:  # exact float32 products do not run on tensor cores
        return GemmTile(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=2)
    if isinstance(arch, str):  # AMD: 64 threads a warp, 64 KiB of shared memory
        return GemmTile(block_m=128, block_n=128, block_k=64, num_warps=4, num_stages=2)
    if arch < 90 or not use_tma:
        return GemmTile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4)
    if arch >= 100:  # the wider tile spills where the epilogue adds a residual
        return GemmTile(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, use_tma=True)
    return GemmTile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, use_tma=True)


def can_use_tma(matrix) -> bool:
    """Whether the matrix meets what a tensor descriptor asks for."""
    aligned = matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
    return matrix.numel() > 0 and matrix.stride(1) == 1 and aligned


@triton.jit
def _load_block(
    source, stride, row, col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr, USE_TMA: tl.constexpr
):
    """A [ROWS, COLS] block at (row, col) of a [num_rows, num_cols] matrix, 0 outside."""
    if USE_TMA:
        block = source.load([row, col])
    else:
        offs_row = row + tl.arange(0, ROWS)
        offs_col = col + tl.arange(0, COLS)
        mask = (offs_row < num_rows)[:, None] & (offs_col < num_cols)[None, :]
        pointers = source + offs_row.to(tl.int64)[:, None] * stride + offs_col[None, :]
        block = tl.load(pointers, mask=mask, other=0.0)
    return block


@triton.jit(do_not_specialize=["stream", "threshold"])
def _lowrank_gemm_kernel(
    x, w, z_ptr, u_ptr, seed_ptr, bias_ptr, scale_ptr, residual, out, tiles_ptr,
    M, N, K, num_tiles_n, stride_xm, stride_w, stride_zm, stride_u, stride_residualm, stride_outm, scaling,
    stream, threshold,
    TRANSPOSED: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    COL_MULTIPLE: tl.constexpr, RANK_MULTIPLE: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_tiles_m = tl.cdiv(M, BLOCK_M)
    num_tiles = num_tiles_m * num_tiles_n
    num_in_group = GROUP_M * num_tiles_n
    for tile_idx in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        first_m = tile_idx // num_in_group * GROUP_M
        group_rows = min(num_tiles_m - first_m, GROUP_M)
        pid_m = first_m + tile_idx % num_in_group % group_rows
        pid_n = tile_idx % num_in_group // group_rows
        row = pid_m * BLOCK_M
        entry = tiles_ptr + pid_n * 4
        # Values from memory are opaque to the compiler: without the hints their blocks are not loaded as vectors.
        first_col = tl.multiple_of(tl.load(entry), COL_MULTIPLE)
        end_col = tl.multiple_of(tl.load(entry + 1), COL_MULTIPLE)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

        # Phase 1: the low-rank steps of this segment.
        if z_ptr is not None:
            first_rank = tl.multiple_of(tl.load(entry + 2), RANK_MULTIPLE)
            end_rank = tl.multiple_of(tl.load(entry + 3), RANK_MULTIPLE)
            num_ranks = end_rank - first_rank
            for r in range(0, num_ranks, BLOCK_R):
                rank = first_rank + r
                z = _load_block(z_ptr, stride_zm, row, rank, M, end_rank, BLOCK_M, BLOCK_R, False)
                if TRANSPOSED:
                    u = _load_block(u_ptr, stride_u, first_col, r, end_col, num_ranks, BLOCK_N, BLOCK_R, False).T
                else:
                    u = _load_block(u_ptr, stride_u, rank, first_col, end_rank, end_col, BLOCK_R, BLOCK_N, False)
                acc = tl.dot(z, u.to(z.dtype), acc, input_precision="ieee")
            acc *= scaling
            if seed_ptr is not None:
                offs_row = row + tl.arange(0, BLOCK_M)
                dropped = dropped_tile(tl.load(seed_ptr), stream, threshold, offs_row, first_col, BLOCK_N)
                acc = tl.where(dropped, 0.0, acc)

        # Phase 2: the frozen GEMM.
        for k in range(0, K, BLOCK_K):
            a = _load_block(x, stride_xm, row, k, M, K, BLOCK_M, BLOCK_K, USE_TMA)
            if TRANSPOSED:
                b = _load_block(w, stride_w, first_col, k, end_col, K, BLOCK_N, BLOCK_K, USE_TMA).T
            else:
                b = _load_block(w, stride_w, k, first_col, K, end_col, BLOCK_K, BLOCK_N, USE_TMA)
            acc = tl.dot(a, b, acc, input_precision="ieee")

        # Phase 3: the epilogue, in the accumulator.
        offs_n = first_col + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end_col
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if scale_ptr is not None:
            acc *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if residual is not None:
            block = _load_block(residual, stride_residualm, row, first_col, M, end_col, BLOCK_M, BLOCK_N, USE_TMA)
            acc += block.to(tl.float32)
        if USE_TMA:
            out.store([row, first_col], acc.to(x.dtype))
        else:
            offs_m = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
            mask = (offs_m < M)[:, None] & mask_n[None, :]
            tl.store(out + offs_m[:, None] * stride_outm + offs_n[None, :], acc.to(out.dtype.element_ty), mask=mask)


def lowrank_gemm(
    x, weight, *, tile: GemmTile, z=None, u=None, scaling=1.0, segments: Sequence[SegmentShape] | None = None,
    transposed=True, p=0.0, seed=None, stream=0, bias=None, scale=None, residual=None, out=None,
    num_programs: int | None = None,
):  # fmt: skip
    """The fused GEMM, out [M, N] in x's dtype. All matrices have unit column stride.

    transposed=True (forward): x [M, K], weight [N, K], z [M, sum of ranks], u [N, R] with R at least the largest rank:
        output column n of segment i adds `scaling * sum_r z[:, first_rank_i + r] u[n, r]` over r < rank_i.
    transposed=False (dx): x [M, K], weight [K, N], z [M, R], u [R, N]; one segment. p, seed, stream: dropout of the
        low-rank product z u [M, N], which is divided by the probability of being kept.
    segments: columns and ranks, in order; one segment when None. u may be wider in dtype than x.
    bias, scale [N] any float dtype; residual [M, N], added last; out: written where given (a view of a wider buffer
    may be). num_programs: persistent programs, one for each multiprocessor when None.

    Raises:
        ValueError: segments do not make up the shapes, or `tile.use_tma` with matrices or segments that it cannot take.
    """
    num_rows, depth = x.shape
    num_out = weight.shape[0] if transposed else weight.shape[1]
    rank = 0 if z is None else z.shape[1]
    segments = tuple(segments or (SegmentShape(num_out, rank),))
    check_segments("lowrank_gemm", segments, num_out, rank)
    if not transposed and len(segments) > 1:
        raise ValueError(f"lowrank_gemm: expected one segment with transposed=False, got {len(segments)}")
    if p > 0.0 and transposed:
        raise ValueError("lowrank_gemm: expected dropout with transposed=False alone, got it forward")
    out = x.new_empty(num_rows, num_out) if out is None else out
    if not out.numel():
        return out
    wide = rank > 0 and u.element_size() > x.element_size()
    checked = {"x": x, "weight": weight, "out": out, **({} if residual is None else {"residual": residual})}

    def attempt(tile: GemmTile) -> None:
        if tile.use_tma:
            check_tma(tile, segments, **checked)
        operand = _descriptor if tile.use_tma else lambda matrix, block: matrix
        tiles = column_tiles(segments, tile.block_n, x.device)
        num_tiles = cdiv(num_rows, tile.block_m) * tiles.shape[0]
        launch(
            _lowrank_gemm_kernel, (min(num_tiles, num_programs or num_multiprocessors(x.device)),), x.device,
            operand(x, [tile.block_m, tile.block_k]),
            operand(weight, [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]),
            z if rank else None, u if rank else None, seed if rank and p > 0.0 else None, bias, scale,
            None if residual is None else operand(residual, [tile.block_m, tile.block_n]),
            operand(out, [tile.block_m, tile.block_n]), tiles,
            num_rows, num_out, depth, tiles.shape[0], x.stride(0), weight.stride(0), z.stride(0) if rank else 0,
            u.stride(0) if rank else 0, 0 if residual is None else residual.stride(0), out.stride(0),
            scaling * inverse_keep_of(p), stream, threshold_of(p),
            TRANSPOSED=transposed, USE_TMA=tile.use_tma,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            BLOCK_R=block_of_ranks(segments, tile, wide),
            COL_MULTIPLE=gcd(16, *(segment.num_out for segment in segments)),
            RANK_MULTIPLE=gcd(16, *(segment.rank for segment in segments)),
            GROUP_M=GROUP_M, **tile.options,
        )  # fmt: skip

    if p > 0.0 and rank % 16:  # blocks of z and U that are no whole vectors, and the mask, take registers
        tile = replace(tile, block_n=min(tile.block_n, 128))
    fitted(Footprint("lowrank_gemm", architecture(x.device), x.element_size(), wide=wide), tile, x.device, attempt)
    return out


def block_of_ranks(segments: Sequence[SegmentShape], tile: GemmTile, wide: bool) -> int:
    """Ranks of a low-rank step: no deeper than a step of x W, half as deep where U is wide, so that neither step takes
    more shared memory than the other."""
    block = padded_rank(max(segment.rank for segment in segments) or 1, tile.block_k)
    return max(16, block // 2) if wide else block


def check_tma(tile: GemmTile, segments: tuple[SegmentShape, ...], **operands) -> None:
    for name, matrix in operands.items():
        if not can_use_tma(matrix):
            raise ValueError(
                f"lowrank_gemm: expected {name} 16-byte aligned with a row stride of whole 16 bytes for TMA, "
                f"got a row stride of {matrix.stride(0)} {matrix.element_size()}-byte elements"
            )
    inner = [segment.num_out for segment in segments[:-1]]
    if any(num_out % tile.block_n for num_out in inner):
        raise ValueError(f"lowrank_gemm: expected segments of whole tiles of {tile.block_n} for TMA, got {inner}")


def _descriptor(matrix, block):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, block)

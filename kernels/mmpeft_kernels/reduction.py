"""Second half of every split reduction: partial sums added in a fixed order, so that results repeat bit by bit."""

import triton
import triton.language as tl

from mmpeft_kernels.launch import launch
from mmpeft_kernels.tile import Tile, cdiv

DEFAULT_TILE = Tile(block_m=16, block_n=64)
# Of so many columns there are programs enough without rows side by side, and rows are read in wide pieces.
_WIDE_TILE, _MANY_COLUMNS = Tile(block_m=4, block_n=512), 1 << 17


@triton.jit
def sum_block(partial_ptr, out_ptr, pid, S, N, scaling, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes block `pid` of out [N], `scaling` times the sum of partial [S, N] over S."""
    offs_n = tl.cast(pid, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for s in range(0, S, BLOCK_S):
        offs_s = s + tl.arange(0, BLOCK_S).to(tl.int64)
        mask = (offs_s < S)[:, None] & (offs_n < N)[None, :]
        acc += tl.load(partial_ptr + offs_s[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0) * scaling
    tl.store(out_ptr + offs_n, total.to(out_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _sum_kernel(partial_ptr, out_ptr, S, N, scaling, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    sum_block(partial_ptr, out_ptr, tl.program_id(0), S, N, scaling, BLOCK_S, BLOCK_N)


def sum_partials(partial, out_dtype, *, scaling: float = 1.0, tile: Tile | None = None):
    """`scaling` times the sum of contiguous float32 partials [S, ...] over S, as [...] in `out_dtype`."""
    out = partial.new_empty(partial.shape[1:], dtype=out_dtype)
    if out.numel():
        tile = tile or (_WIDE_TILE if out.numel() >= _MANY_COLUMNS else DEFAULT_TILE)
        launch(
            _sum_kernel, (cdiv(out.numel(), tile.block_n),), out.device,
            partial, out, partial.shape[0], out.numel(), scaling,
            BLOCK_S=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
        )  # fmt: skip
    return out

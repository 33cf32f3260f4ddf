"""Counter-based dropout masks: the bits of `mmpeft_fast.ops.dropout`, generated where they are used.

Philox4x32-7 (Salmon et al., SC'11). Element (m, k) is lane k % 8 of counter (k // 8, m, stream, 0) under key `seed`
and is dropped where its 16-bit lane, read as a signed integer, is below `round(p * 2**16) - 2**15`.
"""

import triton
import triton.language as tl

from mmpeft_kernels.launch import launch
from mmpeft_kernels.tile import Tile, cdiv

_ROUNDS = tl.constexpr(7)
DEFAULT_TILE = Tile(block_m=16, block_n=128)


def threshold_of(p: float) -> int:
    """Lanes below this are dropped."""
    return round(p * 65536) - 32768


def inverse_keep_of(p: float) -> float:
    """1 / (the exact probability with which an element is kept: `p` rounded to 16 bits)."""
    return 1.0 / (1.0 - round(p * 65536) / 65536)


@triton.jit
def dropped_tile(seed, stream, threshold, offs_m, col, BLOCK_N: tl.constexpr):
    """Which elements of rows `offs_m` [BLOCK_M] and columns [col, col + BLOCK_N) are dropped; 8 divides `col`."""
    block = col // 8 + tl.arange(0, BLOCK_N // 8)
    column_counter = tl.broadcast_to(block[None, :], [offs_m.shape[0], BLOCK_N // 8])
    row_counter = tl.broadcast_to(offs_m.to(tl.int32)[:, None], column_counter.shape)
    zero = tl.zeros_like(column_counter)
    # One call serves eight neighbours of a row: word w of a counter holds lanes 2w (low half) and 2w + 1 (high half).
    w0, w1, w2, w3 = tl.philox(seed, column_counter, row_counter, zero + stream, zero, n_rounds=_ROUNDS)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int32, bitcast=True)
    return tl.interleave((words << 16) >> 16, words >> 16) < threshold


@triton.jit(do_not_specialize=["stream", "threshold"])
def _dropped_kernel(
    seed_ptr, mask_ptr, M, K, stream, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(1) * BLOCK_N
    offs_n = col + tl.arange(0, BLOCK_N)
    mask = dropped_tile(tl.load(seed_ptr), stream, threshold, offs_m, col, BLOCK_N)
    inside = (offs_m[:, None] < M) & (offs_n[None, :] < K)
    tl.store(mask_ptr + offs_m[:, None] * K + offs_n[None, :], mask, mask=inside)


def dropped(seed, num_rows: int, num_cols: int, p: float, *, stream: int = 0, tile: Tile = DEFAULT_TILE):
    """The mask as a bool tensor [num_rows, num_cols]: the kernels that use it never store it, tests do.

    seed: 0-dim int64 tensor on the device of the result.
    """
    import torch

    mask = torch.empty((num_rows, num_cols), dtype=torch.bool, device=seed.device)
    if mask.numel():
        grid = (cdiv(num_rows, tile.block_m), cdiv(num_cols, tile.block_n))
        launch(
            _dropped_kernel, grid, seed.device, seed, mask, num_rows, num_cols, stream, threshold_of(p),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, **tile.options,
        )  # fmt: skip
    return mask

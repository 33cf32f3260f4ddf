"""Segments of a stacked weight (q,k,v; gate,up) as a table of column tiles that a program reads its own bounds from."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from mmpeft_kernels.tile import cdiv


class SegmentShape(NamedTuple):
    """`num_out` columns of the output, and the `rank` columns of z (stacked in the same order) that add to them."""

    num_out: int
    rank: int


@cache  # for good: a recorded CUDA graph reads it where it lies
def column_tiles(segments: tuple[SegmentShape, ...], block_n: int, device):
    """int32 [num_tiles, 4]: first column, end of its segment, first rank, end of rank. No tile crosses a segment."""
    import torch

    rows, column, rank = [], 0, 0
    for segment in segments:
        end, rank_end = column + segment.num_out, rank + segment.rank
        rows += [(start, end, rank, rank_end) for start in range(column, end, block_n)]
        column, rank = end, rank_end
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 4).to(device)


@cache  # for good: a recorded CUDA graph reads it where it lies
def segment_tiles(segments: tuple[SegmentShape, ...], block_n: int, device):
    """int32 [num_segments, 4]: first and end of a segment's column tiles, first rank, end of rank."""
    import torch

    rows, tile, rank = [], 0, 0
    for segment in segments:
        end, rank_end = tile + cdiv(segment.num_out, block_n), rank + segment.rank
        rows.append((tile, end, rank, rank_end))
        tile, rank = end, rank_end
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 4).to(device)


def check_segments(op: str, segments: Sequence[SegmentShape], num_out: int, rank: int) -> None:
    """Raises ValueError unless the segments make up `num_out` columns and `rank` ranks."""
    got = sum(segment.num_out for segment in segments), sum(segment.rank for segment in segments)
    if got != (num_out, rank):
        raise ValueError(f"{op}: expected segments with {num_out} columns and rank {rank} in all, got {got}")

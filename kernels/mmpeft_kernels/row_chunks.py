"""How a sum over rows is split among programs: chunks whose partial sums `reduction.sum_partials` adds in order."""

from collections.abc import Iterator
from contextlib import contextmanager

from mmpeft_kernels.tile import cdiv

# Programs a multiprocessor should have to hide memory latency, where the sum is long enough.
_PROGRAMS_PER_MULTIPROCESSOR = 2
# Of tensors that lie on no GPU: few, so that small operands are split in Triton's interpreter.
_assumed = 3


@contextmanager
def assumed_multiprocessors(count: int) -> Iterator[None]:
    """Inside, tensors that lie on no GPU count as tensors of a GPU with so many multiprocessors."""
    global _assumed
    before, _assumed = _assumed, count
    try:
        yield
    finally:
        _assumed = before


def num_multiprocessors(device) -> int:
    """Multiprocessors of a CUDA device."""
    import torch

    if device.type != "cuda":
        return _assumed
    return torch.cuda.get_device_properties(device).multi_processor_count


def rows_per_chunk(num_rows: int, block_m: int, num_columns_of_programs: int, multiprocessors: int) -> int:
    """A multiple of `block_m`: as few chunks as keep every multiprocessor busy, since each costs a partial sum."""
    wanted = cdiv(_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors, max(1, num_columns_of_programs))
    num_chunks = max(1, min(wanted, cdiv(num_rows, block_m)))
    return max(1, cdiv(cdiv(num_rows, num_chunks), block_m)) * block_m

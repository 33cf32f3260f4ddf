"""Candidate tiles of every tuned kernel: small lists of launch fields, as `mmpeft_kernels.tile.Tile` takes them.

None stands for the kernel's own default and comes first. What a device cannot hold is left out by arithmetic; what
spills or does not compile shows when a candidate is tried.
"""

from itertools import product

Fields = dict[str, int] | None

# Shared memory of a block on sm_90 and sm_100 (CUDA programming guide, table of limits).
SHARED_BYTES = 227 * 1024
# Registers of a multiprocessor that a block's float32 accumulators may take: half of 65536, the rest is for operands.
_ACCUMULATOR_VALUES = 32768


def _shared_bytes(block_m: int, block_n: int, block_k: int, num_stages: int, itemsize: int, staging: bool) -> int:
    ring = (block_m + block_n) * block_k * num_stages * itemsize
    return ring + (block_m * block_n * itemsize if staging else 0)


def gemm_candidates(itemsize: int = 2) -> list[Fields]:
    """Of the plain GEMM: tensor-core tiles that leave room for what they need."""
    found: list[Fields] = [None]
    for (block_m, block_n), (block_k, num_stages), num_warps in product(
        ((128, 256), (256, 128), (128, 128), (64, 256)), ((64, 3), (64, 4), (128, 2)), (4, 8)
    ):
        # A warpgroup's share of the accumulator: 64 x 256 values are 128 registers a thread.
        fits = block_m * block_n <= 64 * 256 * (num_warps // 4)
        if fits and _shared_bytes(block_m, block_n, block_k, num_stages, itemsize, staging=True) <= SHARED_BYTES:
            fields = {"block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": num_stages}
            found.append({**fields, "block_k": block_k, "use_tma": True})
    return found


def gluon_candidates(itemsize: int = 2) -> list[Fields]:
    """Of the warp-specialised GEMM: two warpgroups multiply, the result waits in shared memory."""
    found: list[Fields] = [None]
    for block_m, block_n, num_stages in ((128, 128, 4), (128, 128, 5), (256, 128, 3), (128, 256, 2)):
        if _shared_bytes(block_m, block_n, 64, num_stages, itemsize, staging=True) <= SHARED_BYTES:
            fields = {"block_m": block_m, "block_n": block_n, "num_warps": 8, "num_stages": num_stages}
            found.append({**fields, "block_k": 64, "use_tma": True})
    return found


def _row_tiles(blocks, warps, stages) -> list[Fields]:
    return [None] + [
        {"block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": num_stages}
        for (block_m, block_n), num_warps, num_stages in product(blocks, warps, stages)
    ]


def prologue_candidates(rank: int) -> list[Fields]:
    """rank: columns of a; 0 for none."""
    if rank == 0:
        return _row_tiles(((1, 2048), (1, 4096), (2, 1024), (4, 512), (8, 512)), (4, 8), (1,))
    blocks = [(16, 128), (32, 128), (64, 64), (32, 64)]
    blocks = [(m, n) for m, n in blocks if m * min(rank, 256) <= _ACCUMULATOR_VALUES]
    # Four warps cannot hold a wide accumulator without spills.
    return _row_tiles(blocks, (4, 8) if rank <= 128 else (8,), (2,))


def prologue_backward_candidates(rank: int) -> list[Fields]:
    if rank == 0:
        return _row_tiles(((1, 2048), (2, 1024), (4, 512), (8, 256), (16, 128)), (4, 8), (1,))
    return _row_tiles(((16, 128), (32, 128), (64, 64), (32, 64), (16, 256)), (4, 8), (1,))


def dy_pass_candidates(rank: int) -> list[Fields]:
    blocks = [(32, 128), (64, 64), (64, 128), (128, 128), (64, 256), (128, 256)]
    held = [(m, n) for m, n in blocks if (m + n) * min(max(rank, 16), 128) <= _ACCUMULATOR_VALUES]
    return _row_tiles(held, (8,), (2, 3))


def ddown_candidates(rank: int) -> list[Fields]:
    blocks = [(32, 64), (32, 128), (64, 64), (64, 128), (32, 256)]
    held = [(m, n) for m, n in blocks if n * min(max(rank, 16), 128) <= _ACCUMULATOR_VALUES]
    return _row_tiles(held, (4, 8), (2,))

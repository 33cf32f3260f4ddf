"""How much shared memory a launch needs, by arithmetic, and the largest tile that a device can hold.

What Triton keeps there, as its compiled kernels show: the operands of a matrix product, and the blocks that a pipelined
loop copies ahead, `num_stages` of them where a warpgroup multiplies from shared memory (Hopper and later, 64 rows and
more), one fewer elsewhere. `tests/kernels/test_shared_memory.py` holds every formula to the compiler's own figure:
never below it, and near it where it matters.
"""

from collections.abc import Callable
from typing import NamedTuple

from mmpeft_kernels.tile import Tile, architecture, smaller

_KIB = 1024
# Bytes that one block may have, for every architecture that the kernels are compiled for ahead of time or share the
# instructions of (CUDA programming guide, table of limits by compute capability); AMD's is the local data share of a
# CDNA 3 workgroup (its instruction set manual).
LIMITS: dict[int | str, int] = {
    80: 163 * _KIB, 86: 99 * _KIB, 87: 163 * _KIB, 89: 99 * _KIB, 90: 227 * _KIB, 100: 227 * _KIB, 103: 227 * _KIB,
    120: 99 * _KIB, 121: 99 * _KIB, "gfx942": 64 * _KIB,
}  # fmt: skip
# Barriers and what aligns the blocks.
_BARRIERS = 2 * _KIB
_SCRATCH = 32 * _KIB


class Footprint(NamedTuple):
    """What decides a launch's shared memory beside its tile.

    kernel: a name of `FORMULAS`; itemsize: bytes of an element of the operands; block_r: ranks (or the head dimension)
    of a block, 0 without a branch; prologue: of the kernels that have one; wide: D or U is float32 under narrower
    operands.
    """

    kernel: str
    arch: int | str
    itemsize: int
    block_r: int = 0
    prologue: str = "none"
    wide: bool = False

    def bytes(self, tile: Tile) -> int:
        """At least what a launch of `tile` needs."""
        return FORMULAS[self.kernel](self, tile)

    def __str__(self) -> str:
        rank = f" of rank {self.block_r}" if self.block_r else ""
        return f"{self.kernel}{rank} in {8 * self.itemsize} bits"


def limit_of(device) -> int | None:
    """Bytes of shared memory that one block may have on a device; None where nobody knows."""
    if device.type == "cuda":
        import torch

        limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
        if limit:
            return limit
    return LIMITS.get(architecture(device))


def fit(footprint: Footprint, tile: Tile, limit: int | None) -> Tile:
    """`tile`, or the first smaller one that `limit` bytes hold; the smallest there is where none does."""
    while limit is not None and footprint.bytes(tile) > limit:
        following = smaller(tile)
        if following is None:
            break
        tile = following
    return tile


def _by_warpgroup(f: Footprint, rows: int) -> bool:
    """Whether a product of so many rows is a warpgroup's (or the tensor memory's), which reads from shared memory."""
    return isinstance(f.arch, int) and 90 <= f.arch < 120 and rows >= 64 and f.itemsize == 2


def _copies(f: Footprint, tile: Tile, rows: int) -> int:
    """Blocks that a pipelined loop holds of what it copies; 0 where nothing is copied ahead. rows: of its product."""
    if tile.num_stages == 1:
        return 0
    return tile.num_stages if _by_warpgroup(f, rows) else tile.num_stages - 1


def _scratch(values: int) -> int:
    """Room in which a float32 block of `values` changes its layout, a part at a time."""
    return min(4 * values, _SCRATCH)


def _adapter(f: Footprint, values: int, copies: int) -> int:
    """Bytes of a block of D or U: what is copied ahead in its own dtype, cast for the product where it is wide."""
    if not copies:
        return (4 if f.wide else f.itemsize) * values
    return 4 * copies * values + f.itemsize * values if f.wide else f.itemsize * copies * values


def _shrink(f: Footprint, tile: Tile) -> int:
    h, copies = tile.block_m * tile.block_n, _copies(f, tile, tile.block_m)
    down = _adapter(f, f.block_r * tile.block_n, copies)
    loop = down + f.itemsize * (copies * h + h)
    return max(loop, _scratch(tile.block_m * f.block_r)) + _BARRIERS


def _prologue_backward(f: Footprint, tile: Tile) -> int:
    copies = _copies(f, tile, tile.block_m)
    da = f.itemsize * max(1, copies) * f.block_r * tile.block_m
    product = da + _adapter(f, f.block_r * tile.block_n, copies)
    return max(product, _scratch(tile.block_m * tile.block_n)) + _BARRIERS


def _ddown(f: Footprint, tile: Tile) -> int:
    h, da, copies = tile.block_m * tile.block_n, tile.block_m * f.block_r, _copies(f, tile, f.block_r)
    inputs = 2 if f.prologue == "swiglu" else 1
    rstd = 4 * tile.block_m * copies if f.prologue == "rms_norm" else 0
    if not copies:
        loop = 2 * (da + h)
    elif _by_warpgroup(f, f.block_r):  # a second input is copied a step later, into the place of h
        loop = copies * da + max(copies + 1, inputs * copies - 1) * h
    else:
        loop = copies * (da + inputs * h) + h
    # A warpgroup's accumulator leaves in one piece.
    accumulator = f.block_r * tile.block_n
    leaving = 4 * accumulator if _by_warpgroup(f, f.block_r) else _scratch(accumulator)
    return max(f.itemsize * loop + rstd, leaving) + _BARRIERS


def _dy_pass(f: Footprint, tile: Tile) -> int:
    dy, z, u = tile.block_m * tile.block_n, tile.block_m * f.block_r, tile.block_n * f.block_r
    rows = max(tile.block_m, tile.block_n)
    copies = _copies(f, tile, rows)
    if isinstance(f.arch, str):  # AMD: copies wait in registers
        loop = f.itemsize * (u + max(dy, z))
    elif not copies:
        loop = f.itemsize * (u + 2 * dy + z) + 4 * z
    elif _by_warpgroup(f, rows):
        loop = f.itemsize * (u + copies * (dy + z)) + 4 * z
    elif f.itemsize == 2:  # both products take dy from registers, by way of one block: only a is copied ahead
        loop = f.itemsize * (u + copies * z + dy) + max(f.itemsize * z, min(6 * z, 16 * _KIB))
    else:
        loop = f.itemsize * (u + copies * (dy + z)) + max(4 * z, f.itemsize * dy)
    return max(loop, _scratch(u)) + _BARRIERS


def _post_adapter(f: Footprint, tile: Tile) -> int:
    y, z = tile.block_m * tile.block_n, tile.block_m * f.block_r
    copies = _copies(f, tile, tile.block_m)
    weight = _adapter(f, tile.block_n * f.block_r, copies)
    return max(weight + f.itemsize * (copies * y + max(y, z)), _scratch(max(y, z))) + _BARRIERS


def _prefix(f: Footprint, tile: Tile) -> int:
    return 2 * f.itemsize * (tile.block_m + tile.block_n) * f.block_r + _BARRIERS


def _prefix_backward(f: Footprint, tile: Tile) -> int:
    return f.itemsize * ((2 + 2 * tile.num_stages) * tile.block_m + 2 * tile.block_n) * f.block_r + _BARRIERS


def _gemm(f: Footprint, tile: Tile) -> int:
    out, stages = tile.block_m * tile.block_n, max(1, _copies(f, tile, tile.block_m))
    stages = tile.num_stages if tile.use_tma else stages
    ring = stages * f.itemsize * (tile.block_m + tile.block_n) * tile.block_k
    # The result waits beside the ring until its copy by TMA has left.
    product = ring + f.itemsize * out if tile.use_tma else max(ring, _scratch(out))
    # The ring of the low-rank steps is gone before that of x and W is there.
    block_r = max(16, tile.block_k // 2) if f.wide else 0
    low_rank = stages * f.itemsize * tile.block_m * block_r + _adapter(f, tile.block_n * block_r, stages)
    return max(product, low_rank) + _BARRIERS


FORMULAS: dict[str, Callable[[Footprint, Tile], int]] = {
    "shrink": _shrink,
    "prologue_backward": _prologue_backward,
    "ddown": _ddown,
    "dy_pass": _dy_pass,
    "post_adapter": _post_adapter,
    "prefix": _prefix,
    "prefix_backward": _prefix_backward,
    "lowrank_gemm": _gemm,
    "lowrank_gemm_gluon": _gemm,
}

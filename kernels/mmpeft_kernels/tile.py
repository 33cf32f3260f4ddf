"""How a launch is cut into blocks: chosen by pure functions beside each kernel, or given by the caller."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Sizes of one launch. A program owns `block_m` rows and works on `block_n` columns at a time."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self):
        for name in ("block_m", "block_n", "num_warps"):
            check_power_of_two(name, getattr(self, name))

    @property
    def options(self) -> dict:
        """Keyword arguments of a launch. Contracting a * b + c is chosen here: Triton's default is an environment
        variable, and changes in 3.10."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def check_power_of_two(name: str, value: int) -> None:
    """Raises ValueError unless `value` is a positive power of two."""
    if value < 1 or value & (value - 1):
        raise ValueError(f"tile: expected {name} to be a power of two, got {value}")


def smaller(tile: Tile) -> Tile | None:
    """The next smaller tile: fewer stages while more than one copy is kept in flight, then narrower, then lower blocks.

    None where there is nothing left to take away.
    """
    if tile.num_stages > 2:
        return replace(tile, num_stages=tile.num_stages - 1)
    if tile.block_n > 32:
        return replace(tile, block_n=tile.block_n // 2)
    if tile.num_stages > 1:
        return replace(tile, num_stages=1)
    if tile.block_m > 16:
        return replace(tile, block_m=tile.block_m // 2)
    return replace(tile, block_n=16) if tile.block_n > 16 else None


# Of tensors that lie on no GPU: the interpreter's, and those that launches are recorded on.
_assumed: int | str = 80


@contextmanager
def assumed_architecture(arch: int | str) -> Iterator[None]:
    """Inside, tensors that lie on no GPU count as tensors of a GPU of this architecture."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def architecture(device) -> int | str:
    """Compute capability of a CUDA device (80, 90, 100), name of an AMD one ("gfx942"); 80 where there is no GPU."""
    return _architecture_of(device.index) if device.type == "cuda" else _assumed


@functools.cache
def _architecture_of(index: int | None) -> int | str:
    import torch

    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded_rank(rank: int, most: int = 512) -> int:
    """The block that holds `rank` columns of a dot product: a power of two, at least 16 and at most `most`."""
    return min(most, max(16, 1 << (rank - 1).bit_length()))

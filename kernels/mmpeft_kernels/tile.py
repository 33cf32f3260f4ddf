"""How a launch is cut into blocks: chosen by pure functions beside each kernel, or given by the caller."""

from dataclasses import dataclass


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


def architecture(device) -> int | str:
    """Compute capability of a CUDA device (80, 90, 100), name of an AMD one ("gfx942"); 80 where there is no GPU."""
    import torch

    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def padded_rank(rank: int, most: int = 512) -> int:
    """The block that holds `rank` columns of a dot product: a power of two, at least 16 and at most `most`."""
    return min(most, max(16, 1 << (rank - 1).bit_length()))

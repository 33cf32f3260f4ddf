"""Which provider runs an op on a device, and how: from committed measurements, never from timing while training.

`mmpeft_kernels/tuned/<gpu>.json` is what `python -m bench.gpu` measured on that GPU: the proven provider of every op,
the fastest way to run the low-rank GEMM and the tile of every kernel, by shape bucket. Without such a table:

    CPU          the C++ kernels where the extension is built, else torch
    unknown GPU  Triton with default tiles for what the table of another GPU has proven, torch for the rest, GEMMs by
                 layout, and one log line

Calls of few rows (decoding) take the composite of torch on every GPU.
"""

import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

OPS = ("fused_linear", "attention", "rms_norm", "linear_cross_entropy")
# Below this many rows a GEMM reads its weight once whatever runs it, and launches are what costs.
SMALL_M = 64
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Table:
    """What was measured on one GPU.

    device: its name; providers: op -> proven provider; gemm: bucket -> composite | layout | triton | gluon | cuda;
    tiles: kernel -> bucket -> fields of the kernel's tile; ways: kernel that is no GEMM -> bucket -> "composite" where
    library GEMMs are faster than it (identity activations); source: the results file the choices come from.
    """

    device: str
    source: str
    providers: Mapping[str, str] = field(default_factory=dict)
    gemm: Mapping[str, str] = field(default_factory=dict)
    tiles: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    ways: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def slug(device_name: str) -> str:
    """The file name of a device: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def bucket(dtype: torch.dtype, **sizes: int) -> str:
    """The key of a shape: sizes rounded up to powers of two, such as "bf16 m4096 n16384 k4096 r64"."""
    rounded = (f"{name}{1 << max(0, size - 1).bit_length()}" for name, size in sizes.items())
    return " ".join((DTYPE_NAMES.get(dtype, str(dtype)), *rounded))


def tuned_folder() -> Path:
    return Path(str(resources.files("mmpeft_kernels"))) / "tuned"


@functools.cache
def tables() -> dict[str, Table]:
    """Every committed table by the slug of its device."""
    found = {}
    for path in sorted(tuned_folder().glob("*.json")):
        found[path.stem] = Table(**json.loads(path.read_text()))
    return found


def table_named(device_name: str) -> Table | None:
    return tables().get(slug(device_name))


@functools.cache
def table_of(device: torch.device) -> Table | None:
    """The table of a CUDA device, or None."""
    return table_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def read_again() -> None:
    """Forgets tables and choices, after the folder of tables has changed."""
    for cached in (tables, table_of, _cached_choice):
        cached.cache_clear()


def choose(op: str, device: torch.device) -> tuple[str, str]:
    """(provider, why) of an op on a device, for calls of many rows."""
    if device.type == "cpu":
        return _choose_on_cpu()
    if device.type != "cuda":
        return "torch", f"no other provider runs on {device.type}"
    table = table_of(device)
    if table is not None:
        return table.providers.get(op, "torch"), f"measured on this GPU: {table.source}"
    name = torch.cuda.get_device_name(device)
    _say_unknown(name)
    proven = [other.device for other in tables().values() if other.providers.get(op) == "triton"]
    if proven:
        return "triton", f"{name} is not measured; proven on {proven[0]}: default tiles, GEMMs by layout"
    return "torch", f"{name} is not measured and the Triton kernels are proven on no GPU yet; GEMMs by layout"


def _choose_on_cpu() -> tuple[str, str]:
    from mmpeft_fast.ops import csrc

    reason = csrc.why_unavailable()
    if reason is None:
        return "cpu", "C++ kernels, measured in bench/results"
    return "torch", f"plain PyTorch with a hand-written backward; the C++ extension is not there: {reason}"


@functools.cache
def _say_unknown(name: str) -> None:
    _logger.warning("no measurements for %s: GEMMs by layout, default tiles; see `mmpeft-fast doctor`", name)


def default_provider(op: str, x: Tensor) -> str:
    """The provider of a call whose provider nobody has forced."""
    if x.device.type == "cuda" and op == "fused_linear" and x.shape[0] < SMALL_M:
        return "torch"
    return _cached_choice(op, x.device)


@functools.lru_cache(maxsize=256)
def _cached_choice(op: str, device: torch.device) -> str:
    return choose(op, device)[0]


def gemm_realisation(x: Tensor, num_out: int, rank: int, *, direction: str) -> str:
    """How the Triton provider runs a low-rank GEMM; direction: "fwd" or "dx". Triton's own kernel without a table."""
    table = table_of(x.device)
    if table is None:
        return "triton"
    key = f"{direction} " + bucket(x.dtype, m=x.shape[0], n=num_out, k=x.shape[1], r=rank)
    return table.gemm.get(key, "composite")


def wants_layout(device: torch.device, dtype: torch.dtype, num_out: int, depth: int, rank: int) -> bool:
    """Whether a weight on this device should keep columns for its branches: the layout realisation."""
    if device.type != "cuda":
        return False
    table = table_of(device)
    if table is None:
        return True
    suffix = bucket(dtype, n=num_out, k=depth, r=rank).split(" ", 1)[1]
    chosen = [way for key, way in table.gemm.items() if key.startswith("fwd") and key.endswith(suffix)]
    return bool(chosen) and chosen.count("layout") * 2 > len(chosen)


def tile_fields(kernel: str, x: Tensor, **sizes: int) -> Mapping[str, int] | None:
    """The measured tile of a kernel for tensors like x and these sizes, or None for its default."""
    table = table_of(x.device)
    return None if table is None else table.tiles.get(kernel, {}).get(bucket(x.dtype, **sizes))

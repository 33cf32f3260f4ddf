"""Which provider runs an op on a device, and how: from committed measurements, never from timing while training.

`mmpeft_kernels/tuned/<gpu>.json` is what `python -m bench.gpu` measured on that GPU: the proven provider of every op,
the fastest way to run its GEMMs and the tile of every kernel, by shape bucket. A call whose bucket was not measured
takes what was measured at the same rank and sizes within a factor of four, the nearest first, else what a GPU without a
table takes:

    CPU                             the C++ kernels where the extension is built, else torch
    GPU that the kernels compile    Triton with default tiles; the library's GEMMs, forward by layout where weights have
    for (compute capability 8.0,    the columns, and for dy of ranks from 64 on: on an H200 they are within 1.00 to 1.20
    8.6 to 9.0, 10.x, 12.x; gfx942) of the bare GEMM and dy_pass is beaten from there on
    any other GPU                   torch

Both are said once, in one log line. Calls of few rows (decoding) take the composite of torch on every GPU.
"""

import functools
import importlib.util
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from mmpeft_fast.ops import tape

OPS = ("fused_linear", "attention", "rms_norm", "linear_cross_entropy")
# Below this many rows a GEMM reads its weight once whatever runs it, and launches are what costs.
SMALL_M = 64
# From this rank on dy_pass moves more bytes for its partial sums of da than two library GEMMs read of dy again: a
# partial of 4 R bytes for each row and block of 128 columns, written and read, against 2 * 128 bytes.
_LIBRARY_DY_RANK = 64
# How far from a bucket (factor in each size, m n or k) a measurement still speaks for it.
_NEAR = 4
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Table:
    """What was measured on one GPU.

    device: its name; providers: op -> proven provider; gemm: bucket -> composite | layout | triton | gluon | cuda;
    tiles: kernel -> bucket -> fields of the kernel's tile; ways: kernel that is no GEMM -> bucket -> "composite" where
    library GEMMs are faster than it (identity activations), and for "masked_dx" (`draws_in_dx`) "triton" or
    "composite"; source: the results file the choices come from.
    architecture: as `mmpeft_kernels.tile.architecture` gives it.
    """

    device: str
    source: str
    providers: Mapping[str, str] = field(default_factory=dict)
    gemm: Mapping[str, str] = field(default_factory=dict)
    tiles: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    ways: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    architecture: int | str = 90


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


def is_gpu(device: torch.device) -> bool:
    """Whether calls on this device are dispatched as a GPU's."""
    return device.type == "cuda"


@functools.cache
def table_of(device: torch.device) -> Table | None:
    """The table of a CUDA device, or None."""
    return table_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def read_again() -> None:
    """Forgets tables, choices and what was said of them, after the folder of tables has changed."""
    for cached in (tables, table_of, _cached_choice, _say, _measured):
        cached.cache_clear()
    _unmeasured.clear()
    tape.forget()


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a GPU, or None."""
    if any(importlib.util.find_spec(part) is None for part in ("triton", "mmpeft_kernels")):
        return "triton is not installed"
    from mmpeft_kernels.shared_memory import LIMITS
    from mmpeft_kernels.tile import architecture

    arch = architecture(device)
    if arch in LIMITS:
        return None
    name = arch if isinstance(arch, str) else f"compute capability {arch // 10}.{arch % 10}"
    return f"the Triton kernels are not compiled for {name}"


def choose(op: str, device: torch.device) -> tuple[str, str]:
    """(provider, why) of an op on a device, for calls of many rows."""
    if device.type == "cpu":
        return _choose_on_cpu()
    if device.type != "cuda":
        return "torch", f"no other provider runs on {device.type}"
    name, table, obstacle = torch.cuda.get_device_name(device), table_of(device), why_no_triton(device)
    if obstacle is not None:
        _say(f"{name}: the torch provider runs every op, because {obstacle}")
        return "torch", obstacle
    if table is None:
        _say(
            f"{name} is not measured: Triton kernels with default tiles and the library's GEMMs run; "
            "`python -m bench.gpu` measures it"
        )
        return "triton", f"{name} is not measured: default tiles, the library's GEMMs"
    chosen, why = table.providers.get(op, "triton"), f"measured on this GPU: {table.source}"
    if chosen == "cuda":
        from mmpeft_fast.ops import csrc

        if csrc.why_no_cuda() is not None:
            return "triton", f"{why}; cuda is the fastest there, but {csrc.why_no_cuda()}"
    return chosen, why


def _choose_on_cpu() -> tuple[str, str]:
    from mmpeft_fast.ops import csrc

    reason = csrc.why_unavailable()
    if reason is None:
        return "cpu", "C++ kernels, measured in bench/results"
    return "torch", f"plain PyTorch with a hand-written backward; the C++ extension is not there: {reason}"


@functools.cache
def _say(sentence: str) -> None:
    _logger.warning("%s", sentence)


def default_provider(op: str, x: Tensor) -> str:
    """The provider of a call whose provider nobody has forced."""
    if x.device.type == "cuda" and op == "fused_linear" and x.shape[0] < SMALL_M:
        return "torch"
    return _cached_choice(op, x.device)


@functools.lru_cache(maxsize=256)
def _cached_choice(op: str, device: torch.device) -> str:
    return choose(op, device)[0]


def _distance(bucket: str, other: str) -> float | None:
    """How far apart two buckets are, in factors of two; None where they differ in dtype, direction or rank."""
    total = 0.0
    for word, other_word in zip(bucket.split(), other.split(), strict=True):
        if word == other_word:
            continue
        if word[0] not in "mnk" or word[0] != other_word[0] or not word[1:].isdigit():
            return None
        factor = abs(math.log2(int(word[1:]) / int(other_word[1:])))
        if factor > math.log2(_NEAR):
            return None
        total += factor
    return total


@functools.lru_cache(maxsize=4096)
def _measured(device: torch.device, kernel: str, bucket: str) -> str | None:
    """The bucket of the device's table that speaks for a call of `kernel`: its own or the nearest; None for neither.

    kernel: "fwd" or "dx" for ways of the GEMM, else a name of the table's tiles.
    """
    table = table_of(device)
    if kernel in ("fwd", "dx"):
        known = [key.removeprefix(f"{kernel} ") for key in table.gemm if key.startswith(f"{kernel} ")]
    else:
        known = sorted({*table.tiles.get(kernel, {}), *table.ways.get(kernel, {})})
    if bucket in known:
        return bucket
    distances = {key: distance for key in known if (distance := _distance(bucket, key)) is not None}
    nearest = min(distances, key=distances.get, default=None)
    # A kernel that has no row in the table keeps its default: nothing about this call is special.
    if known:
        instead = "the defaults run" if nearest is None else f"{nearest!r} stands for it"
        _say_unmeasured(table.device, f"{kernel} at {bucket!r}", instead)
    return nearest


_unmeasured: set[str] = set()


def _say_unmeasured(device_name: str, what: str, instead: str) -> None:
    """Once for a GPU, at the first such call."""
    if device_name not in _unmeasured:
        _unmeasured.add(device_name)
        _logger.warning(
            "%s: %s was not measured, %s (and so for other such calls); `python -m bench.gpu` measures them",
            device_name, what, instead,
        )  # fmt: skip


def gemm_realisation(x: Tensor, num_out: int, rank: int, *, direction: str) -> str:
    """How the Triton provider runs a low-rank GEMM: composite, layout, triton, gluon or cuda; direction: "fwd" or "dx".

    The library's GEMM where nothing was measured: forward by layout where the weight has columns for it
    (`ops.layout`), composite elsewhere. Triton's own kernel for tensors on no GPU, which only its interpreter runs.
    """
    if not is_gpu(x.device):
        return "triton"
    table = table_of(x.device)
    if table is not None:
        key = _measured(x.device, direction, bucket(x.dtype, m=x.shape[0], n=num_out, k=x.shape[1], r=rank))
        if key is not None:
            return table.gemm[f"{direction} {key}"]
    return "layout" if direction == "fwd" else "composite"


def dy_realisation(dy: Tensor, rank: int) -> str:
    """How the Triton provider computes da and dU of branches of `rank` from dy [M, N]: "triton", its one pass, or
    "composite", two library GEMMs a branch; as `gemm_realisation` for what was not measured."""
    if not is_gpu(dy.device):
        return "triton"
    table = table_of(dy.device)
    if table is not None:
        key = _measured(dy.device, "dy_pass", bucket(dy.dtype, m=dy.shape[0], n=dy.shape[1], r=rank))
        if key is not None:
            return table.ways.get("dy_pass", {}).get(key, "triton")
    return "composite" if rank >= _LIBRARY_DY_RANK else "triton"


def draws_in_dx(dy: Tensor, num_in: int, rank: int) -> bool:
    """Whether the Triton provider adds mask * (da D) of branches of `rank` in the GEMM that makes dx [M, num_in] of
    dy [M, N], by its own kernel, and not in the pass over dx after the library's GEMM.

    Where nothing was measured: on Hopper and later, whose kernel is within 1.04 of the library's.
    """
    if not is_gpu(dy.device):
        return True
    table = table_of(dy.device)
    if table is not None and "masked_dx" in table.ways:
        key = _measured(dy.device, "masked_dx", bucket(dy.dtype, m=dy.shape[0], n=num_in, k=dy.shape[1], r=rank))
        if key is not None:
            return table.ways["masked_dx"][key] == "triton"
    arch = _architecture(dy.device)
    return isinstance(arch, int) and arch >= 90


def _architecture(device: torch.device) -> int | str:
    from mmpeft_kernels.tile import architecture

    return architecture(device)


def wants_layout(device: torch.device, dtype: torch.dtype, num_out: int, depth: int, rank: int) -> bool:
    """Whether a weight on this device should keep columns for its branches: most measured calls of its size, of
    whatever rows, are by layout. True for a GPU without a table."""
    if not is_gpu(device):
        return False
    table = table_of(device)
    if table is None:
        return why_no_triton(device) is None
    rows = sorted({word for key in table.gemm if key.startswith("fwd ") for word in key.split() if word[0] == "m"})
    ways = []
    for word in rows:
        key = _measured(device, "fwd", bucket(dtype, m=int(word[1:]), n=num_out, k=depth, r=rank))
        ways.append("layout" if key is None else table.gemm[f"fwd {key}"])
    return not ways or ways.count("layout") * 2 > len(ways)


def tile_fields(kernel: str, x: Tensor, **sizes: int) -> Mapping[str, int] | None:
    """The measured tile of a kernel for tensors like x and these sizes, or None for its default."""
    table = table_of(x.device)
    if table is None or kernel not in table.tiles:
        return None
    key = _measured(x.device, kernel, bucket(x.dtype, **sizes))
    return None if key is None else table.tiles[kernel].get(key)

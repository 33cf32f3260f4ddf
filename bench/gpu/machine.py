"""The machine as the measurements saw it: device, driver, clocks, versions, and tools that are there."""

import shutil
import subprocess
from collections.abc import Iterator

from bench.gpu.repository import commit

_QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "temperature.gpu",
    "power.draw", "power.limit", "memory.used", "persistence_mode",
)  # fmt: skip
_TOOLS = ("nvcc", "ncu", "nsys", "compute-sanitizer", "cuobjdump", "c++")


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU now, numbers with their units; {} where it is not there or fails."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except subprocess.TimeoutExpired:
        return {}
    values = done.stdout.strip().split("\n")[0].split(", ")
    return dict(zip(_QUERY, values, strict=True)) if len(values) == len(_QUERY) else {}


def why_no_gpu() -> str | None:
    """One sentence on why nothing can be measured here, or None."""
    import torch

    if torch.version.cuda is None:
        return (
            f"bench.gpu: expected a CUDA build of torch and an NVIDIA GPU, got torch {torch.__version__} without CUDA"
        )
    if not torch.cuda.is_available():
        return "bench.gpu: expected an NVIDIA GPU that torch can use, found none"
    return None


def describe() -> Iterator[dict]:
    """One row; run in a process of its own, because it starts CUDA."""
    import torch

    from mmpeft_fast.doctor import versions

    properties = torch.cuda.get_device_properties(0)
    nvcc = shutil.which("nvcc")
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
    yield {
        "device": torch.cuda.get_device_name(0),
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "versions": versions(),
        "nvcc": release.strip().split("\n")[-1] or None,
        "tools": {name: shutil.which(name) is not None for name in _TOOLS},
        **commit(),
    }

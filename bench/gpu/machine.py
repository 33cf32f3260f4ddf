"""The machine as the measurements saw it: device, driver, clocks, versions, and tools that are there."""

import os
import shutil
import subprocess
from collections.abc import Iterator

import torch

from bench.gpu.repository import commit
from mmpeft_fast.doctor import device_name, versions

_QUERY = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw", "power.limit",
    "memory.used",
)  # fmt: skip
_TOOLS = ("nvcc", "ncu", "nsys", "compute-sanitizer", "c++")
_COPY_BYTES = 1 << 30


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
    if torch.version.cuda is None:
        return (
            f"bench.gpu: expected a CUDA build of torch and an NVIDIA GPU, got torch {torch.__version__} without CUDA"
        )
    if not torch.cuda.is_available():
        return "bench.gpu: expected an NVIDIA GPU that torch can use, found none"
    return None


def describe(device: str) -> Iterator[dict]:
    """One row, with the rates that kernels are held to; in a process of its own, because it starts CUDA."""
    row: dict = {
        "device": device_name(device), "host_cores": os.cpu_count(), "versions": versions(),
        "tools": [name for name in _TOOLS if shutil.which(name)], **commit(), **clocks(),
    }  # fmt: skip
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "capability": list(torch.cuda.get_device_capability(0)), "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda,
        }  # fmt: skip
    yield row | rates(device)


def rates(device: str) -> dict[str, float]:
    """copy_gb_s: bytes read and written by a large copy; gemm_tflops: the library's bf16 GEMM at a 7B layer's size."""
    from bench.gpu.timing import device_of, timed

    size, (m, n, k) = (_COPY_BYTES, (4096, 11008, 4096)) if device == "cuda" else (1 << 20, (64, 64, 64))
    source, x, w = (torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((size // 2,), (m, k), (k, n)))
    target = torch.empty_like(source)
    x.normal_(), w.normal_()
    found = timed({"copy": lambda: target.copy_(source), "gemm": lambda: x @ w}, device_of(device))
    copy_ms, gemm_ms = (found[name].row()["p20_ms"] for name in ("copy", "gemm"))
    return {"copy_gb_s": 2 * size / copy_ms / 1e6, "gemm_tflops": 2 * m * n * k / gemm_ms / 1e9}

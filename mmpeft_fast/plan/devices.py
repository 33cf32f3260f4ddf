"""Device profiles: what a device can hold, how fast it computes and moves bytes, and where each number is from."""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmpeft_fast.atomic import write_text
from mmpeft_fast.fields import check_fields, shown
from mmpeft_fast.json_text import parse

GIB = 2**30
_DTYPE_NAMES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device as the roofline sees it. Rates are what software reaches, not the data sheet's peaks.

    Attributes:
        type: "cuda" or "cpu".
        memory_bytes: of the device; reserve_bytes: of it not for tensors.
        bytes_per_s: of a kernel that moves data from and to memory.
        gemm: dtype -> (FLOPs of one product, FLOP/s), ascending; between them rates are interpolated.
        attention, attention_backward: dtype -> FLOP/s of the fused kernels.
        launch_s: what a launch costs on the device beside its work; host_s: what it costs the CPU that queues it.
        sources: where each number comes from.
    """

    name: str
    type: str
    memory_bytes: int
    reserve_bytes: int = 0
    bytes_per_s: float
    gemm: Mapping[str, tuple[tuple[float, float], ...]]
    attention: Mapping[str, float]
    attention_backward: Mapping[str, float]
    launch_s: float
    host_s: float
    sources: Mapping[str, str]

    def __post_init__(self):
        check_fields(self, "device.")
        if self.type not in ("cuda", "cpu"):
            raise ValueError(f"device {self.name}: expected type cuda or cpu, got {self.type!r}")
        numbers = {name: getattr(self, name) for name in ("memory_bytes", "bytes_per_s")}
        numbers |= {f"attention {dtype}": rate for dtype, rate in self.attention.items()}
        numbers |= {f"attention_backward {dtype}": rate for dtype, rate in self.attention_backward.items()}
        for dtype in _DTYPE_NAMES:
            points = self.gemm.get(dtype)
            if not points or dtype not in self.attention or dtype not in self.attention_backward:
                raise ValueError(f"device {self.name}: expected rates of {dtype} for gemm, attention and its backward")
            if any(len(point) != 2 for point in points):
                raise ValueError(
                    f"device {self.name}: expected points (FLOPs, rate) of gemm {dtype}, got {shown(points)}"
                )
            numbers |= {f"gemm {dtype} at {flops:g}": rate for flops, rate in points}
            numbers |= {f"FLOPs of gemm {dtype}": flops for flops, _ in points}
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise ValueError(f"device {self.name}: expected {name} to be a positive number, got {value!r}")
        for name in ("launch_s", "host_s", "reserve_bytes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"device {self.name}: expected {name} of at least 0, got {getattr(self, name)!r}")

    def gemm_rate(self, dtype: str, flops: float) -> float:
        """FLOP/s of a product with so many FLOPs: interpolated over the logarithm, constant beyond the ends."""
        points = self.gemm[dtype]
        if flops <= points[0][0]:
            return points[0][1]
        for (low, low_rate), (high, high_rate) in itertools.pairwise(points):
            if flops <= high:
                share = math.log(flops / low) / math.log(high / low)
                return low_rate + share * (high_rate - low_rate)
        return points[-1][1]


@dataclass(frozen=True, kw_only=True)
class _Share:
    """A share of a data sheet's peak that software reaches, and who says so."""

    value: float
    source: str


_BANDWIDTH = _Share(value=0.85, source="assumed: streaming kernels reach about 85 % of the data sheet")
_A100_GEMM = _Share(value=0.85, source="80 to 90 % of the peak (Dao 2023, FlashAttention-2, section 1)")
_H100_GEMM = _Share(
    value=0.65, source="cuBLAS fp16 8192 x 8192 x 4096: 646 TFLOP/s on H100 (Triton's Gluon tutorial on persistence)"
)
_ASSUMED_GEMM = _Share(value=0.75, source="assumed, between A100's and H100's shares")
_A100_FLASH = (
    _Share(value=0.70, source="FlashAttention-2 forward, up to 73 % (Dao 2023, section 4.1)"),
    _Share(value=0.60, source="FlashAttention-2 backward, up to 63 % (Dao 2023, section 4.1)"),
)
_H100_FLASH = (
    _Share(value=0.35, source="FlashAttention-2, which torch has, reaches 35 % on H100 (Shah et al. 2024, abstract)"),
    _Share(value=0.30, source="assumed: 0.85 of the forward's share, as on A100"),
)
_ASSUMED_FLASH = (
    _Share(value=0.60, source="assumed: near FlashAttention-2's share on A100"),
    _Share(value=0.50, source="assumed: near FlashAttention-2's share on A100"),
)
_B200_FLASH = (
    _Share(value=0.20, source="assumed: FlashAttention-2 was not written for it"),
    _Share(value=0.17, source="assumed: FlashAttention-2 was not written for it"),
)
_RESERVE_BYTES = GIB  # CUDA context, library workspaces and what the allocator cannot use; assumed


def _gpu(name, *, memory_gib, gb_per_s, half_tflops, fp32_tflops, gemm, flash, sheet) -> Device:
    """A GPU from its data sheet: dense bf16 and fp16 rates of the matrix units, fp32 of the plain ones."""
    forward, backward = flash
    half, full = half_tflops * 1e12, fp32_tflops * 1e12 * 0.85
    return Device(
        name=name,
        type="cuda",
        memory_bytes=memory_gib * GIB,
        reserve_bytes=_RESERVE_BYTES,
        bytes_per_s=gb_per_s * 1e9 * _BANDWIDTH.value,
        gemm={"bf16": ((1.0, half * gemm.value),), "fp16": ((1.0, half * gemm.value),), "fp32": ((1.0, full),)},
        attention={"bf16": half * forward.value, "fp16": half * forward.value, "fp32": full * 0.5},
        attention_backward={"bf16": half * backward.value, "fp16": half * backward.value, "fp32": full * 0.5},
        launch_s=2e-6,
        host_s=8e-6,
        sources={
            "memory, bandwidth, peaks": sheet,
            "bandwidth share": _BANDWIDTH.source,
            "gemm bf16, fp16": gemm.source,
            "gemm fp32": "assumed: 85 % of the data sheet's fp32 rate, without TF32; attention half of that",
            "attention": forward.source,
            "attention_backward": backward.source,
            "reserve, launch_s, host_s": "assumed: 1 GiB of context and workspaces; 2 us between kernels; 8 us of "
            "Python and driver for a launch",
        },
    )


def _cpu() -> Device:
    sheet = "assumed: a server CPU with matrix instructions, 2 cores; --calibrate measures yours"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 16 * GIB
    half, full = 4e11, 2e11
    return Device(
        name="cpu",
        type="cpu",
        memory_bytes=memory,
        bytes_per_s=2.5e10,
        gemm={"bf16": ((1.0, half),), "fp16": ((1.0, full / 2),), "fp32": ((1.0, full),)},
        attention={"bf16": half / 3, "fp16": full / 3, "fp32": full / 2},
        attention_backward={"bf16": half / 4, "fp16": full / 4, "fp32": full / 2},
        launch_s=5e-6,
        host_s=0.0,
        sources={"memory": "this machine's physical memory", "all rates": sheet},
    )


_A100 = {"half_tflops": 312, "fp32_tflops": 19.5, "gemm": _A100_GEMM, "flash": _A100_FLASH}
_HOPPER = {"half_tflops": 989, "fp32_tflops": 67, "gemm": _H100_GEMM, "flash": _H100_FLASH}
_BUILDERS = {
    "a100-40": lambda: _gpu(
        "a100-40", memory_gib=40, gb_per_s=1555, sheet="NVIDIA A100 data sheet, A100 40GB SXM", **_A100
    ),
    "a100-80": lambda: _gpu(
        "a100-80", memory_gib=80, gb_per_s=2039, sheet="NVIDIA A100 data sheet, A100 80GB SXM", **_A100
    ),
    "h100": lambda: _gpu("h100", memory_gib=80, gb_per_s=3350, sheet="NVIDIA H100 data sheet, H100 SXM", **_HOPPER),
    "h200": lambda: _gpu("h200", memory_gib=140, gb_per_s=4800, sheet="NVIDIA H200 data sheet, H200 SXM", **_HOPPER),
    "b200": lambda: _gpu(
        "b200", memory_gib=179, gb_per_s=7700, half_tflops=2250, fp32_tflops=75, gemm=_ASSUMED_GEMM, flash=_B200_FLASH,
        sheet="NVIDIA HGX B200 data sheet, an eighth of it",
    ),
    "l40s": lambda: _gpu(
        "l40s", memory_gib=48, gb_per_s=864, half_tflops=362, fp32_tflops=91.6, gemm=_ASSUMED_GEMM,
        flash=_ASSUMED_FLASH, sheet="NVIDIA L40S data sheet",
    ),
    "rtx-4090": lambda: _gpu(
        "rtx-4090", memory_gib=24, gb_per_s=1008, half_tflops=165.2, fp32_tflops=82.6, gemm=_ASSUMED_GEMM,
        flash=_ASSUMED_FLASH, sheet="NVIDIA Ada GPU architecture whitepaper, RTX 4090 with FP32 accumulation",
    ),
    "cpu": _cpu,
}  # fmt: skip
DEVICES = tuple(_BUILDERS)


def device_named(name: str) -> Device:
    """A profile by name, or from a JSON file that `write_device` made.

    Raises:
        ValueError: no such profile, or a file that is none.
    """
    if name in _BUILDERS:
        return _BUILDERS[name]()
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"device: expected one of {list(DEVICES)} or a profile's file, got {name!r}")
    try:
        fields = parse(path.read_text(encoding="utf-8"), name)
        fields["gemm"] = {dtype: tuple(tuple(point) for point in points) for dtype, points in fields["gemm"].items()}
        return Device(**fields)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"device: expected a profile written by --calibrate in {name}: {error}") from error


def write_device(device: Device, path: Path) -> None:
    """Writes a profile as JSON, whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(device), indent=2) + "\n")

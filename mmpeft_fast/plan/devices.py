"""Device profiles: what a device can hold, how fast it computes and moves bytes, and where each number is from."""

import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from mmpeft_fast.atomic import write_text
from mmpeft_fast.fields import check_fields, shown
from mmpeft_fast.json_text import parse

GIB = 2**30
_DTYPE_NAMES = ("bf16", "fp16", "fp32")
_HOST_KINDS = ("forward", "backward", "triton", "graph")
# One rate, or (FLOPs of one call, FLOP/s), ascending.
Rate = float | tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device as the roofline sees it. Rates are what software reaches, not the data sheet's peaks.

    Attributes:
        type: "cuda" or "cpu".
        memory_bytes: of the device; reserve_bytes: of it not for tensors.
        bytes_per_s: of a copy. regular: the share of it that torch's kernels reach which walk through their operands
            in one line; irregular: of the others (broadcasts, strided operands, reductions, joins, widening casts).
        gemm: dtype -> rate of products. attention, attention_backward: of torch's flash attention; cudnn_attention,
            cudnn_attention_backward: of cuDNN's, where torch takes it on this device.
        load_clock: the share of the highest clock that products keep in whole steps.
        launch_s: what a launch costs on the device beside its work.
        host_s: what it costs the CPU that queues it: an op of torch in the forward pass (and the optimizer), one of
            autograd's in the backward pass, a Triton kernel, a kernel of a CUDA graph.
        kernels: name of a Triton kernel -> what it reaches: "bytes", a share of `bytes_per_s`, and "products", a share
            of the largest products' rate (of those of its own size where no bytes are said).
        gpu_name: what its driver calls it.
        sources: where each number comes from.
    """

    name: str
    type: str
    memory_bytes: int
    reserve_bytes: int = 0
    bytes_per_s: float
    regular: float = 1.0
    irregular: float = 1.0
    gemm: Mapping[str, Rate]
    attention: Mapping[str, Rate]
    attention_backward: Mapping[str, Rate]
    cudnn_attention: Mapping[str, Rate] = field(default_factory=dict)
    cudnn_attention_backward: Mapping[str, Rate] = field(default_factory=dict)
    load_clock: float = 1.0
    launch_s: float
    host_s: Mapping[str, float]
    kernels: Mapping[str, Mapping] = field(default_factory=dict)
    gpu_name: str = ""
    sources: Mapping[str, str]

    def __post_init__(self):
        check_fields(self, "device.")
        if self.type not in ("cuda", "cpu"):
            raise ValueError(f"device {self.name}: expected type cuda or cpu, got {self.type!r}")
        shares = ("regular", "irregular", "load_clock")
        numbers = {name: getattr(self, name) for name in ("memory_bytes", "bytes_per_s", *shares)}
        for name in ("gemm", "attention", "attention_backward", "cudnn_attention", "cudnn_attention_backward"):
            rates = getattr(self, name)
            if set(rates) - set(_DTYPE_NAMES) or (set(_DTYPE_NAMES) - set(rates) and not name.startswith("cudnn")):
                raise ValueError(f"device {self.name}: expected rates of {', '.join(_DTYPE_NAMES)} for {name}")
            for dtype, rate in rates.items():
                points = _points(rate)
                if not points or any(len(point) != 2 for point in points):
                    raise ValueError(
                        f"device {self.name}: expected points (FLOPs, rate) of {name} {dtype}, got {shown(points)}"
                    )
                numbers |= {f"{name} {dtype} at {flops:g}": value for flops, value in points}
                numbers |= {f"FLOPs of {name} {dtype}": flops for flops, _ in points}
        for name, reached in self.kernels.items():
            numbers |= {f"{what} of {name}": value for what, value in reached.items() if what in ("bytes", "products")}
        for name, value in numbers.items():
            if not 0 < value < math.inf:
                raise ValueError(f"device {self.name}: expected {name} to be a positive number, got {value!r}")
        missing = sorted(set(_HOST_KINDS) - set(self.host_s))
        if missing:
            raise ValueError(f"device {self.name}: expected host_s for {list(_HOST_KINDS)}, got none for {missing}")
        costs = {name: getattr(self, name) for name in ("launch_s", "reserve_bytes")}
        for name, value in (costs | {f"host_s {kind}": cost for kind, cost in self.host_s.items()}).items():
            if not value >= 0:
                raise ValueError(f"device {self.name}: expected {name} of at least 0, got {value!r}")

    @property
    def sdpa(self) -> str:
        """The library's attention that torch takes without a mask."""
        return "cudnn" if self.cudnn_attention else "flash"

    @property
    def with_ideal_kernels(self) -> "Device":
        """The same device, were this package's kernels as good as the library's."""
        return dataclasses.replace(self, kernels={})

    def memory_rate(self, *, is_regular: bool = True) -> float:
        return self.bytes_per_s * (self.regular if is_regular else self.irregular)

    def gemm_rate(self, dtype: str, flops: float) -> float:
        """FLOP/s of a product with so many FLOPs."""
        return self._clock(dtype) * interpolated(self.gemm[dtype], flops)

    def largest_gemm_rate(self, dtype: str) -> float:
        """The highest FLOP/s of products."""
        return self._clock(dtype) * max(rate for _, rate in _points(self.gemm[dtype]))

    def attention_rate(self, dtype: str, flops: float, *, backward: bool, cudnn: bool) -> float:
        """FLOP/s of an attention with so many FLOPs, causality left aside."""
        name = ("cudnn_" if cudnn else "") + ("attention_backward" if backward else "attention")
        return self._clock(dtype) * interpolated(getattr(self, name)[dtype], flops)

    def _clock(self, dtype: str) -> float:
        """Matrix units are what brings a card to its power limit."""
        return 1.0 if dtype == "fp32" else self.load_clock


def _points(rate: Rate) -> Sequence[tuple[float, float]]:
    return ((1.0, rate),) if isinstance(rate, int | float) else rate


def interpolated(rate: Rate, flops: float) -> float:
    """The rate at a size: interpolated over the logarithm, constant beyond the ends."""
    points = _points(rate)
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
_LAUNCH_S = 1e-6  # assumed
# Shares of a copy: milliseconds by kernel of the frozen model's profile over the planner's bytes.
_REGULAR, _IRREGULAR = 0.9, 0.4
# The host of the H200's rows, a slow one. A usual one is taken to be 2.5 times as fast.
_SLOW_HOST_S = {"forward": 30e-6, "backward": 12e-6, "triton": 160e-6, "graph": 1e-6}
_HOST_S = {kind: seconds / 2.5 for kind, seconds in _SLOW_HOST_S.items()}
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
        launch_s=_LAUNCH_S,
        host_s=_HOST_S,
        regular=_REGULAR,
        irregular=_IRREGULAR,
        kernels=_measured_kernels()[0],
        sources={
            "memory, bandwidth, peaks": sheet,
            "bandwidth share": _BANDWIDTH.source,
            "gemm bf16, fp16": gemm.source,
            "gemm fp32": "assumed: 85 % of the data sheet's fp32 rate, without TF32; attention half of that",
            "attention": forward.source,
            "attention_backward": backward.source,
            "reserve, launch_s": "assumed: 1 GiB of context and workspaces, 1 us between kernels",
            "host_s": "assumed: the host of the H200's rows is 2.5 times as slow",
            "regular, irregular": "as measured on an H200",
            "kernels": f"as measured on an H200: {_measured_kernels()[1]}",
        },
    )


@functools.cache
def _measured_kernels() -> tuple[dict[str, dict], str]:
    """What this package's Triton kernels reach, by name, and where that was measured."""
    path = resources.files("mmpeft_kernels") / "rates" / "nvidia-h200.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["kernels"], f"{found['source']}, at commit {found['commit']}"


def _h200(name: str, host_s: Mapping[str, float]) -> Device:
    """The H200 as it was measured (bench/results/nvidia-h200)."""
    sheet = _gpu(name, memory_gib=140, gb_per_s=4800, sheet="NVIDIA H200 data sheet, H200 SXM", **_HOPPER)
    giga, tera = 1e9, 1e12
    half = (
        (2.9 * giga, 320 * tera), (94 * giga, 733 * tera), (252 * giga, 787 * tera), (505 * giga, 792 * tera),
        (825 * giga, 740 * tera), (2225 * giga, 718 * tera),
    )  # fmt: skip
    full = 47 * tera
    near, far = 32.1 * giga, 481 * giga  # FLOPs of attention at 4 x 700 and at 2 x 4096 tokens, not halved

    def attention(at_near: float, at_far: float, scale: float) -> dict[str, Rate]:
        points = ((scale * near, at_near * tera), (scale * far, at_far * tera))
        return {"bf16": points, "fp16": points, "fp32": full * 0.5}

    return dataclasses.replace(
        sheet,
        bytes_per_s=4.234e12,
        gemm={"bf16": half, "fp16": half, "fp32": full},
        attention=attention(133, 346, 1.0),
        attention_backward=attention(152, 297, 2.5),
        cudnn_attention=attention(300, 500, 1.0),
        cudnn_attention_backward=attention(228, 400, 2.5),
        load_clock=0.94,
        host_s=host_s,
        gpu_name="NVIDIA H200",
        sources={
            "all that is measured": "one NVIDIA H200, torch 2.11, commit d880b0b: bench/results/nvidia-h200",
            "memory": "NVIDIA H200 data sheet, H200 SXM; 1 GiB reserved, assumed",
            "bandwidth": "copy 4.23 TB/s (extra, copy)",
            "gemm bf16, fp16": "products of LLaMA-7B and Qwen2.5-7B layers at M = 2800 and 8192 (extra, gemm); skinny "
            "ones from HF PEFT's profile with bf16 adapters (extra, profile); the largest ran at the power limit",
            "gemm fp32": "from HF PEFT's layer with fp32 and with bf16 adapters, 12.39 and 6.89 ms (layer)",
            "attention": "700 tokens: milliseconds by kernel (extra, profile); 4096: 35 % and 30 % of the peak "
            "(Shah et al. 2024, abstract) for flash, assumed 500 and 400 TFLOP/s for cuDNN",
            "load_clock": "1,845 to 1,875 of 1,980 MHz at 680 of 700 W after frozen steps (steps, clocks)",
            "host_s": "160 us a Triton launch, 30 us an op of torch (layer, host), of autograd 12 assumed; graph "
            f"assumed, as no capture succeeded; {'that slow host' if host_s is _SLOW_HOST_S else '2.5 times as fast'}",
            "launch_s": "assumed: 1 us between kernels",
            "regular, irregular": "milliseconds by kernel of the frozen model over its bytes (extra, profile)",
            "kernels": _measured_kernels()[1],
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
        host_s=dict.fromkeys(_HOST_KINDS, 0.0),
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
    "h200": lambda: _h200("h200", _SLOW_HOST_S),
    "h200-usual-host": lambda: _h200("h200-usual-host", _HOST_S),
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
        for rates in ("gemm", "attention", "attention_backward", "cudnn_attention", "cudnn_attention_backward"):
            fields[rates] = {dtype: _read_rate(rate) for dtype, rate in fields.get(rates, {}).items()}
        return Device(**fields)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"device: expected a profile written by --calibrate in {name}: {error}") from error


def _read_rate(rate) -> Rate:
    return tuple(tuple(point) for point in rate) if isinstance(rate, list) else rate


def write_device(device: Device, path: Path) -> None:
    """Writes a profile as JSON, whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(device), indent=2) + "\n")

"""Time of a step: every launch takes the longer of computing and moving its bytes, and starts when the launch before it
has ended and the CPU has queued it.

    end_i = max(end_{i-1}, queued_i) + launch_s + max(FLOPs / rate, bytes / bandwidth)
    queued_i = queued_{i-1} + what a launch of its kind costs the CPU

(Williams, Waterman & Patterson 2009, "Roofline"). Rates are those of the launch's kind, and where it is a kernel of
this package, what that kernel was measured to reach. Causal attention needs half of its FLOPs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mmpeft_fast.plan.counting import Launch, Work
from mmpeft_fast.plan.devices import Device

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def work_seconds(work: Work, device: Device) -> float:
    """Time of one piece of work on the device, its launches included."""
    return sum(map(max, _seconds(work, device))) + work.launches * device.launch_s


def is_compute_bound(work: Work, device: Device) -> bool:
    computing, moving = (sum(column) for column in zip(*_seconds(work, device), strict=True))
    return computing > moving


def _seconds(work: Work, device: Device) -> list[tuple[float, float]]:
    """(computing, moving) of each launch."""
    dtype = _NAMES.get(work.dtype, "fp32")
    if work.inside:
        return [_launch_seconds(launch, dtype, device) for launch in work.inside]
    if not work.flops:
        return [(0.0, work.bytes / device.memory_rate(is_regular=work.kind != "irregular"))]
    flops = work.flops * (0.5 if work.causal else 1.0)
    if work.kind == "gemm":
        rate = device.gemm_rate(dtype, work.flops)
    else:
        is_cudnn = "cudnn" in work.op
        rate = device.attention_rate(dtype, work.flops, backward=work.kind == "attention_backward", cudnn=is_cudnn)
    return [(flops / rate, work.bytes / device.memory_rate())]


def _launch_seconds(launch: Launch, dtype: str, device: Device) -> tuple[float, float]:
    """Of a launch inside a call; a kernel without a measured rate is taken as good as the library's."""
    reached = device.kernels.get(launch.kernel, {})
    moving = launch.bytes / (device.bytes_per_s * reached.get("bytes", device.regular))
    if not launch.flops:
        return 0.0, moving
    share = reached.get("products")
    if share is None:
        # A kernel that is known by its bytes alone makes its products on the way.
        return (0.0 if "bytes" in reached else launch.flops / device.gemm_rate(dtype, launch.flops)), moving
    is_whole = "bytes" not in reached  # a GEMM: its size decides; else the kernel's own rate, whatever the size
    rate = device.gemm_rate(dtype, launch.flops) if is_whole else device.largest_gemm_rate(dtype)
    return launch.flops / (share * rate), moving


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """seconds of a step; device_s of the kernels alone, host_s of queueing them; graph_s: were the step replayed as a
    CUDA graph."""

    seconds: float
    device_s: float
    host_s: float
    graph_s: float

    @property
    def is_host_bound(self) -> bool:
        return self.host_s > self.device_s


def _queueing_seconds(work: Work, device: Device) -> float:
    host = device.host_s
    eager = host["backward" if work.phase == "backward" else "forward"]
    if not work.inside:
        return eager
    return sum(host["triton"] if launch.is_triton else eager for launch in work.inside)


def step_time(sequence: Iterable[Work], device: Device) -> StepTime:
    """The time of a step that queues these works in this order."""
    known: dict[Work, tuple[float, float]] = {}
    queued = ended = device_s = 0.0
    launches = 0
    for work in sequence:
        if work not in known:
            known[work] = work_seconds(work, device), _queueing_seconds(work, device)
        seconds, queueing = known[work]
        queued += queueing
        ended = max(ended, queued) + seconds
        device_s += seconds
        launches += work.launches
    graph_s = max(device_s, launches * device.host_s["graph"])
    return StepTime(seconds=max(ended, queued), device_s=device_s, host_s=queued, graph_s=graph_s)

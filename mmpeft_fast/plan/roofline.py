"""Time of a step: each piece of work takes the longer of computing and moving its bytes, plus its launches.

    step = max( sum max(FLOPs / rate, bytes / bandwidth) + launches * launch_s,  launches * host_s )

(Williams, Waterman & Patterson 2009, "Roofline"). Kernels follow one another; a CPU that queues them more slowly than
they run is the second term. Causal attention needs half of its FLOPs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmpeft_fast.plan.counting import Work
from mmpeft_fast.plan.devices import Device

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def work_seconds(work: Work, device: Device) -> float:
    """Time of one piece of work on the device, its launches included."""
    return max(_compute_seconds(work, device), work.bytes / device.bytes_per_s) + work.launches * device.launch_s


def is_compute_bound(work: Work, device: Device) -> bool:
    return _compute_seconds(work, device) > work.bytes / device.bytes_per_s


def _compute_seconds(work: Work, device: Device) -> float:
    if not work.flops:
        return 0.0
    dtype = _NAMES.get(work.dtype, "fp32")
    if work.kind == "gemm":
        return work.flops / device.gemm_rate(dtype, work.flops)
    rate = device.attention if work.kind == "attention" else device.attention_backward
    return work.flops * (0.5 if work.causal else 1.0) / rate[dtype]


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """seconds of a step; device_s of the kernels alone, host_s of queueing them."""

    device_s: float
    host_s: float

    @property
    def seconds(self) -> float:
        return max(self.device_s, self.host_s)

    @property
    def is_host_bound(self) -> bool:
        return self.host_s > self.device_s


def step_time(works: Mapping[Work, int], device: Device) -> StepTime:
    """The time of a step that consists of these works."""
    return StepTime(
        device_s=sum(count * work_seconds(work, device) for work, count in works.items()),
        host_s=sum(count * work.launches for work, count in works.items()) * device.host_s,
    )

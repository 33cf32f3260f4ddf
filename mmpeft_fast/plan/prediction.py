"""The plan of one step: counts and roofline as the numbers that people ask for."""

import functools
from collections import defaultdict
from dataclasses import asdict, dataclass

from mmpeft_fast.plan.devices import Device
from mmpeft_fast.plan.parts import PARTS
from mmpeft_fast.plan.request import Request
from mmpeft_fast.plan.roofline import StepTime, is_compute_bound, step_time, work_seconds
from mmpeft_fast.plan.step import StepCounts, count_step

ASSUMPTIONS = (
    "no padding; AdamW with float32 states beside float32 trained parameters, no gradient accumulation",
    "an op reads and writes each operand once, whatever caches hold; views and allocations are free; what a Triton "
    "kernel changes in place counts once",
    "kernels run one after another, each once the CPU has queued it; a kernel takes the longer of its FLOPs and its "
    "bytes at the profile's rates",
    "peak: tensors alive at once in the order of execution, without the allocator's fragmentation",
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request, the device, what the step takes and how long it lasts there."""

    request: Request
    device: Device
    counts: StepCounts
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.counts.peak_bytes + self.device.reserve_bytes <= self.device.memory_bytes

    @functools.cached_property
    def ideal_time(self) -> StepTime:
        """The step's time, were the fused kernels as good as the library's at their bytes and FLOPs."""
        return step_time(self.counts.sequence, self.device.with_ideal_kernels)

    @property
    def tokens_per_s(self) -> float:
        return self.request.samples * self.request.seq_len / self.time.seconds

    def total(self, attribute: str, *, without: str | None = None) -> int:
        """Sum of flops, bytes or launches over the step, without a phase where given."""
        works = self.counts.works.items()
        return sum(count * getattr(work, attribute) for work, count in works if work.phase != without)

    def flops_by_purpose(self) -> dict[str, int]:
        """FLOPs of the forward pass, of gradients of activations (dX), of gradients of weights (dW, all trained) and of
        what checkpointing computes again."""
        flops = dict.fromkeys(("forward_flops", "dx_flops", "dw_flops", "recompute_flops"), 0)
        for work, count in self.counts.works.items():
            if work.phase == "backward":
                flops["dw_flops"] += count * work.weight_flops
                flops["dx_flops"] += count * (work.flops - work.weight_flops)
            elif work.phase != "optimizer":
                flops[f"{work.phase}_flops"] += count * work.flops
        return flops

    def part_seconds(self) -> dict[str, float]:
        """Time on the device by part, in the order of PARTS."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for work, count in self.counts.works.items():
            seconds[work.part] += count * work_seconds(work, self.device)
        return {part: value for part, value in seconds.items() if value}

    def by_op(self) -> list[dict]:
        """A row for each op of a part and phase, the slowest first."""
        rows: dict[tuple, list] = defaultdict(lambda: [0, 0, 0, 0.0, 0.0])
        for work, count in self.counts.works.items():
            row = rows[work.part, work.op, work.phase]
            seconds = count * work_seconds(work, self.device)
            for i, value in enumerate((work.launches, work.flops, work.bytes)):
                row[i] += count * value
            row[3] += seconds
            row[4] += seconds if is_compute_bound(work, self.device) else 0.0
        return [
            {
                "part": part, "op": op, "phase": phase, "launches": launches, "flops": flops, "bytes": moved,
                "ms": seconds * 1e3, "bound": "compute" if compute_s * 2 > seconds else "memory",
            }
            for (part, op, phase), (launches, flops, moved, seconds, compute_s) in sorted(
                rows.items(), key=lambda item: -item[1][3]
            )
        ]  # fmt: skip

    def numbers(self) -> dict:
        """The plan's scalars by name."""
        counts = self.counts
        return {
            "trainable_params": counts.trainable_params,
            "frozen_params": counts.frozen_params,
            "weight_bytes": counts.weight_bytes,
            "gradient_bytes": counts.gradient_bytes,
            "optimizer_bytes": counts.optimizer_bytes,
            "saved_bytes": counts.saved_bytes,
            "peak_bytes": counts.peak_bytes,
            **self.flops_by_purpose(),
            "model_flops": self.total("flops", without="recompute"),
            "hardware_flops": self.total("flops"),
            "dram_bytes": self.total("bytes"),
            "launches": self.total("launches"),
            "step_ms": self.time.seconds * 1e3,
            "device_ms": self.time.device_s * 1e3,
            "host_ms": self.time.host_s * 1e3,
            "graph_ms": self.time.graph_s * 1e3,
            "ideal_kernels_ms": self.ideal_time.seconds * 1e3,
            "tokens_per_s": self.tokens_per_s,
            "fits": self.fits,
        }

    def as_json(self) -> dict:
        """Everything, ready for JSON."""
        request = asdict(self.request)
        return {
            "request": request,
            "device": self.device.name,
            "baseline": self.counts.baseline,
            **self.numbers(),
            "by_part_ms": {part: seconds * 1e3 for part, seconds in self.part_seconds().items()},
            "by_op": self.by_op(),
            "sources": dict(self.device.sources),
            "assumptions": list(ASSUMPTIONS),
        }


def plan(request: Request, device: Device) -> Plan:
    """Predicts a step of `request` on `device`.

    Raises:
        ValueError: the request does not fit its model, or the implementation has no such combination.
    """
    counts = count_step(request, device.type, gpu_name=device.gpu_name, sdpa=device.sdpa)
    return Plan(request=request, device=device, counts=counts, time=step_time(counts.sequence, device))

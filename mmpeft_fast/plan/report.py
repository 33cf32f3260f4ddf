"""A plan, a sweep and their answers as text for a terminal."""

from collections.abc import Sequence
from typing import Any

from mmpeft_fast.plan.advice import MOST_SAMPLES, MOST_TOKENS, Change
from mmpeft_fast.plan.prediction import ASSUMPTIONS, Plan
from mmpeft_fast.plan.request import DENSE

GIB = 2**30
_SWEEP_COLUMNS = {
    "trainable": lambda row: count(row["trainable_params"]),
    "saved GiB": lambda row: gib(row["saved_bytes"]),
    "peak GiB": lambda row: gib(row["peak_bytes"]),
    "fits": lambda row: "yes" if row["fits"] else "no",
    "step ms": lambda row: f"{row['step_ms']:.1f}",
    "tokens/s": lambda row: f"{row['tokens_per_s']:.0f}",
    "TFLOP": lambda row: f"{row['hardware_flops'] / 1e12:.2f}",
    "launches": lambda row: str(row["launches"]),
}


def gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.2f}"


def count(value: int) -> str:
    """1234567 -> 1.235 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned lines, the first column to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def aligned(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return "  ".join(padded).rstrip()

    return [aligned(lines[0]), "  ".join("─" * width for width in widths), *map(aligned, lines[1:])]


def plan_text(planned: Plan, *, num_ops: int = 12) -> str:
    """The plan for a reader: memory, work, time by part, the slowest ops, and what all of it assumes."""
    request, device, counts, numbers = planned.request, planned.device, planned.counts, planned.numbers()
    method = "" if request.implementation == "frozen" else f", {request.method}"
    settings = "".join(f" {name}={value}" for name, value in request.settings.items())
    base = "" if request.base == DENSE else f" on {request.base}"
    title = (
        f"{request.model}{method}{settings}, {request.implementation} ({counts.baseline}), {request.dtype}{base}, "
        f"{request.size}, {device.name}"
    )
    fits = "fits" if planned.fits else "does not fit"
    is_fused = request.implementation == "fused" and device.type == "cuda"
    total = sum(planned.part_seconds().values())
    bound = "the CPU that queues launches" if planned.time.is_host_bound else "the device"
    lines = [
        title,
        "",
        f"parameters   {count(counts.trainable_params)} trained of "
        f"{count(counts.trainable_params + counts.frozen_params)}",
        f"memory       {gib(counts.peak_bytes)} GiB at the peak of {gib(device.memory_bytes)}: {fits}",
        f"  weights {gib(counts.weight_bytes)}, optimizer {gib(counts.optimizer_bytes)}, "
        f"gradients {gib(counts.gradient_bytes)}, kept for backward {gib(counts.saved_bytes)} GiB",
        f"work         {numbers['hardware_flops'] / 1e12:.2f} TFLOP "
        f"(forward {numbers['forward_flops'] / 1e12:.2f}, dX {numbers['dx_flops'] / 1e12:.2f}, "
        f"dW {numbers['dw_flops'] / 1e12:.2f}, again {numbers['recompute_flops'] / 1e12:.2f}), "
        f"{numbers['dram_bytes'] / 1e9:.1f} GB, {numbers['launches']} launches",
        f"time         {numbers['step_ms']:.1f} ms a step, {planned.tokens_per_s:.0f} tokens/s, bound by {bound}",
        f"  kernels alone {numbers['device_ms']:.1f}, queueing them {numbers['host_ms']:.1f}, replayed as a CUDA graph "
        f"{numbers['graph_ms']:.1f} ms"
        + (f"; fused kernels as good as the library's {numbers['ideal_kernels_ms']:.1f}" * is_fused),
        "",
    ]
    parts = [
        (part, f"{seconds * 1e3:.2f}", f"{100 * seconds / total:.1f} %")
        for part, seconds in planned.part_seconds().items()
    ]
    lines += table(("part", "ms", "share"), parts) + [""]
    ops = [
        (
            f"{row['part']}: {row['op']}", row["phase"], str(row["launches"]), f"{row['flops'] / 1e12:.3f}",
            f"{row['bytes'] / 1e9:.2f}", f"{row['ms']:.2f}", row["bound"],
        )
        for row in planned.by_op()[:num_ops]
    ]  # fmt: skip
    lines += table(("slowest ops", "phase", "launches", "TFLOP", "GB", "ms", "bound"), ops) + [""]
    lines += ["assumed", *(f"  {line}" for line in ASSUMPTIONS)]
    lines += [f"  {what}: {source}" for what, source in device.sources.items()]
    return "\n".join(lines)


def _at_most(value: int, most: int) -> str:
    return f"{value} or more" if value >= most else str(value or "no")


def answers_text(planned: Plan, batch: int, length: int, found: Sequence[Change]) -> str:
    """The engineer's questions, answered."""
    request = planned.request
    lines = [
        "questions",
        f"  largest batch that fits at {request.seq_len} tokens: {_at_most(batch, MOST_SAMPLES)}",
        f"  longest samples that fit at batch size {request.batch_size}: {_at_most(length, MOST_TOKENS)} tokens",
    ]
    goal = "time" if planned.fits else "memory"
    lines.append(f"  what to change first, for {goal}:")
    for change in found:
        lines.append(
            f"    {change.name}: {change.peak_bytes / GIB:+.2f} GiB, {change.seconds * 1e3:+.1f} ms "
            f"({100 * change.seconds / planned.time.seconds:+.1f} %)"
        )
    lines.append("    packing: a plan has no padding; packed batches save the time and memory of the padded share")
    return "\n".join(lines)


def sweep_text(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> str:
    """A line a point of a sweep."""
    cells = [[*(str(row[name]) for name in names), *(text(row) for text in _SWEEP_COLUMNS.values())] for row in rows]
    return "\n".join(table([*names, *_SWEEP_COLUMNS], cells))

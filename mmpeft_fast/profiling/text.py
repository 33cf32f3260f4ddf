"""Implementations side by side as text for a terminal."""

from collections.abc import Mapping, Sequence

from mmpeft_fast.plan.report import table
from mmpeft_fast.profiling.measured import RATIOS, Measured, comparisons
from mmpeft_fast.profiling.rows import by_part, percent


def title_of(request: Mapping) -> str:
    """What ran, in a line."""
    if "method" not in request:
        return f"{request['what']}, model {request['model']}"
    settings = "".join(f" {name}={value}" for name, value in request["settings"].items())
    layers = "" if request["layers"] is None else f" with {request['layers']} decoder layers"
    # Results of earlier versions have no size in words.
    size = request.get("size", f"{request['batch_size']} x {request['seq_len']} tokens")
    return (
        f"{request['what']} of {request['model']}{layers}, {request['method']}{settings}, {request['dtype']}, "
        f"{size}, {request['device_name']}"
    )


TOTALS = ("", "ms", "ops ms", "launches", "GFLOP", "MB moved", "of roofline", "peak MiB")


def totals(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """A line for each implementation, in the order of TOTALS."""
    return [
        (
            one.name, f"{one.seconds * 1e3:.3f}", f"{one.whole.seconds * 1e3:.3f}", str(one.whole.launches),
            f"{one.whole.flops / 1e9:.2f}", f"{one.whole.bytes / 1e6:.1f}", percent(one.whole.roofline_fraction),
            f"{one.timeline.peak_bytes / 2**20:.1f}",
        )
        for one in measured
    ]  # fmt: skip


def comparison_text(measured: Sequence[Measured], request: Mapping) -> str:
    """Totals, ratios, and milliseconds of ops by part."""
    lines = [title_of(request), "", *table(TOTALS, totals(measured)), ""]
    found = comparisons(measured)
    if found:
        rows = [(pair, *(ratio_text(values[name]) for name in RATIOS)) for pair, values in found.items()]
        lines += [*table(("ratio", *RATIOS), rows), ""]
    parts = {one.name: {row.part: row.seconds for row in by_part(one.rows)} for one in measured}
    names = list(dict.fromkeys(part for seconds in parts.values() for part in seconds))
    rows = [(part, *(f"{parts[one.name].get(part, 0.0) * 1e3:.3f}" for one in measured)) for part in names]
    return "\n".join([*lines, *table(("ops ms by part", *(one.name for one in measured)), rows)])


def ratio_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"

"""What was measured of one implementation, and how two compare."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmpeft_fast.profiling.rows import Row, by_part, total
from mmpeft_fast.profiling.storages import Timeline

RATIOS = ("time", "launches", "bytes", "flops", "peak")
_TIMELINE_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One implementation of a step, layer or op.

    Attributes:
        name: of the implementation; origin: whose code ran.
        times_s: of the runs without tracing, in turn with the other implementations'.
        rows: of the traced run with the median time; timeline: its memory.
        trace: Chrome trace of a run, JSON text.
        memory_snapshot: torch.cuda's, pickled; None on a CPU.
    """

    name: str
    origin: str
    times_s: Sequence[float]
    rows: Sequence[Row]
    timeline: Timeline
    trace: str
    memory_snapshot: bytes | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.times_s)

    @property
    def whole(self) -> Row:
        return total(self.rows)

    def as_json(self) -> dict:
        whole, shown = self.whole, self.timeline.thinned(_TIMELINE_POINTS)
        return {
            "origin": self.origin,
            "seconds": self.seconds,
            "times_s": list(self.times_s),
            "op_seconds": whole.seconds,
            "launches": whole.launches,
            "flops": whole.flops,
            "bytes": whole.bytes,
            "roofline_fraction": whole.roofline_fraction,
            "peak_bytes": self.timeline.peak_bytes,
            "peak_by_role": self.timeline.peak_by_role(),
            "timeline": {"positions": shown.positions, "bytes_by_role": shown.bytes, "phases": shown.phases},
            "by_part": [row.as_json() for row in by_part(self.rows)],
            "by_op": [row.as_json() for row in self.rows],
        }


def ratios(one: Measured, other: Measured) -> Mapping[str, float | None]:
    """`one` over `other` by the names of RATIOS; None over nothing."""
    pairs = {
        "time": (one.seconds, other.seconds),
        "launches": (one.whole.launches, other.whole.launches),
        "bytes": (one.whole.bytes, other.whole.bytes),
        "flops": (one.whole.flops, other.whole.flops),
        "peak": (one.timeline.peak_bytes, other.timeline.peak_bytes),
    }
    return {name: a / b if b else None for name, (a, b) in pairs.items()}


def comparisons(measured: Sequence[Measured]) -> dict[str, Mapping[str, float | None]]:
    """Ratios of every pair: the later over the earlier, such as "fused/peft"."""
    return {
        f"{one.name}/{other.name}": ratios(one, other) for i, one in enumerate(measured) for other in measured[:i][::-1]
    }

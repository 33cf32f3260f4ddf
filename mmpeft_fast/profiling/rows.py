"""Rows of a profile: what each op of a part and phase took, beside what the device's roofline allows."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mmpeft_fast.plan.counting import Work
from mmpeft_fast.plan.devices import Device
from mmpeft_fast.plan.parts import PARTS
from mmpeft_fast.plan.report import table
from mmpeft_fast.plan.roofline import work_seconds
from mmpeft_fast.profiling.trace import Span

OUTSIDE = "outside"  # part of kernels that no op launched


@dataclass(frozen=True, kw_only=True)
class Row:
    """All work of one kind.

    seconds: measured. calls: ops; launches: kernels on a GPU, ops on a CPU. bytes: moved, every operand once.
    ideal_seconds: what the roofline gives without the cost of launches, None without a profile of the device.
    """

    part: str
    op: str
    phase: str
    calls: int
    launches: int
    seconds: float
    flops: int
    bytes: int
    ideal_seconds: float | None

    @property
    def roofline_fraction(self) -> float | None:
        """Of the fastest time the device allows; above 1 where caches beat the memory that the profile knows."""
        return self.ideal_seconds / self.seconds if self.ideal_seconds is not None and self.seconds > 0 else None

    def as_json(self) -> dict:
        return {**dataclasses.asdict(self), "roofline_fraction": self.roofline_fraction}


def rows_of(
    works: Mapping[int, Work], spans: Mapping[int, Span], outside: Mapping[str, Span], device: Device | None
) -> list[Row]:
    """A row for each op of a part and phase, the slowest first.

    Args:
        works, spans: by the work's number. outside: kernels without work, by name. device: its profile, if known.
    """
    free = None if device is None else dataclasses.replace(device, launch_s=0.0)
    single = [
        _row((work.part, work.op, work.phase), spans.get(number, Span(0.0, 0)), work, free)
        for number, work in works.items()
    ]
    single += [_row((OUTSIDE, name, "unknown"), span, None, free) for name, span in outside.items()]
    return sorted(summed(single, "part", "op", "phase"), key=lambda row: -row.seconds)


def _row(key: tuple[str, str, str], span: Span, work: Work | None, device: Device | None) -> Row:
    part, op, phase = key
    if work is None:
        ideal = None if device is None else 0.0
        return Row(
            part=part, op=op, phase=phase, calls=0, launches=span.launches, seconds=span.seconds, flops=0, bytes=0,
            ideal_seconds=ideal,
        )  # fmt: skip
    return Row(
        part=part, op=op, phase=phase, calls=1, launches=span.launches, seconds=span.seconds, flops=work.flops,
        bytes=work.bytes, ideal_seconds=None if device is None else work_seconds(work, device),
    )  # fmt: skip


def summed(rows: Iterable[Row], *names: str) -> list[Row]:
    """Rows that agree in the fields `names` as one; the other names are empty."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return [_sum(dict(zip(names, key, strict=True)), members) for key, members in groups.items()]


def _sum(key: Mapping[str, str], rows: Sequence[Row]) -> Row:
    known = all(row.ideal_seconds is not None for row in rows)
    return Row(
        part=key.get("part", ""), op=key.get("op", ""), phase=key.get("phase", ""),
        calls=sum(row.calls for row in rows), launches=sum(row.launches for row in rows),
        seconds=sum(row.seconds for row in rows), flops=sum(row.flops for row in rows),
        bytes=sum(row.bytes for row in rows),
        ideal_seconds=sum(row.ideal_seconds for row in rows) if known else None,
    )  # fmt: skip


def by_part(rows: Iterable[Row]) -> list[Row]:
    """A row for each part, in the order of PARTS."""
    return sorted(summed(rows, "part"), key=lambda row: (*PARTS, OUTSIDE).index(row.part))


def total(rows: Sequence[Row]) -> Row:
    """Everything."""
    return _sum({}, rows)


def percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.0f} %"


HEADER = ("launches", "ms", "share", "GFLOP", "MB", "of roofline")


def cells(row: Row, whole: Row) -> tuple[str, ...]:
    """A row's numbers as text, in the order of HEADER."""
    share = row.seconds / whole.seconds if whole.seconds else None
    return (
        str(row.launches), f"{row.seconds * 1e3:.3f}", percent(share), f"{row.flops / 1e9:.2f}",
        f"{row.bytes / 1e6:.2f}", percent(row.roofline_fraction),
    )  # fmt: skip


def table_text(rows: Sequence[Row], *, num_ops: int = 20) -> str:
    """Parts, and the slowest ops, for a terminal."""
    whole = total(rows)
    parts = [(row.part, *cells(row, whole)) for row in by_part(rows)]
    ops = [(f"{row.part}: {row.op}, {row.phase}", *cells(row, whole)) for row in rows[:num_ops]]
    lines = [*table(("part", *HEADER), [*parts, ("all", *cells(whole, whole))]), ""]
    if ops:
        lines += table(("slowest ops", *HEADER), ops)
    return "\n".join(lines)

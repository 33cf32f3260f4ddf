"""Two files of rows against each other: ratios with intervals, and what got worse beyond the noise."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.rows import read_rows
from bench.suite.bootstrap import ratio_of_ratios
from mmpeft_fast.plan.report import table

_YARDSTICK = "frozen"
# Bytes are counted, not measured; the least that is worth a word, relative.
_BYTES_TOLERANCE = 0.001
_MEASURED = ("fwd_bwd",)
# What every measured row has, and one with a time besides.
_FIELDS = {"case", "implementation", "status", "device", "dtype"}
_TIMED_FIELDS = {"rounds_ms", "p50_ms", "p20_ms", "p80_ms", "noise", "saved_mib", "x_frozen"}


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One implementation of one case in both files.

    ratio: of the times, new over old, each over the yardstick's in the same rounds unless `absolute`; noise: of the two
    machines; kept: bytes kept, new over old. what: why there are no numbers.
    """

    case: str
    implementation: str
    ratio: float | None = None
    interval: tuple[float, float] = (0.0, 0.0)
    noise: float = 0.0
    kept: float | None = None
    what: str = ""

    @property
    def is_slower(self) -> bool:
        return self.ratio is not None and self.interval[0] > 1 + self.noise

    @property
    def is_faster(self) -> bool:
        return self.ratio is not None and self.interval[1] < 1 - self.noise

    @property
    def keeps_more(self) -> bool:
        return self.kept is not None and self.kept > 1 + _BYTES_TOLERANCE

    @property
    def is_worse(self) -> bool:
        return self.is_slower or self.keeps_more or bool(self.what)


def measured_rows(path: Path, also: Sequence[str] = ()) -> list[dict]:
    """The suite's rows in a file. Raises ValueError where it holds none, or something else."""
    expected = f"{path}: expected JSON lines that `mmpeft-fast bench run` has written"
    try:
        rows = read_rows(path)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{expected}, got something else ({error})") from error
    found = [row for row in rows if isinstance(row, dict) and row.get("op") == "suite"]
    found = [row for row in found if row.get("mode") in (*_MEASURED, *also)]
    if not any(row["mode"] in _MEASURED for row in found):
        raise ValueError(f"{expected}, got {len(rows)} other rows")
    for row in found:
        needed = (
            _FIELDS | (_TIMED_FIELDS if "p50_ms" in row else {"reason"}) if row["mode"] in _MEASURED else {"device"}
        )
        if not needed <= row.keys():
            raise ValueError(f"{expected}, got a row without {', '.join(sorted(needed - row.keys()))}")
    return found


def newest(rows: Sequence[dict]) -> dict[str, dict[str, dict]]:
    """case -> implementation -> its last row; a sweep's shapes and growth's sizes are cases of their own."""
    found: dict[str, dict[str, dict]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["implementation"]] = row
    return found


def compare(old: Sequence[dict], new: Sequence[dict], *, absolute: bool = False) -> list[Compared]:
    """What both have, case by case.

    Raises:
        ValueError: they have no case in common.
    """
    before, after = newest(old), newest(new)
    common = [case for case in before if case in after]
    if not common:
        raise ValueError(f"compare: expected files with cases in common, got {len(before)} and {len(after)} others")
    found = []
    for case in common:
        for name, row in before[case].items():
            is_measured = "rounds_ms" in row and name in after[case]
            has_yardstick = absolute or all("rounds_ms" in rows[case].get(_YARDSTICK, {}) for rows in (before, after))
            if is_measured and has_yardstick and (absolute or name != _YARDSTICK):
                found.append(_compared(case, name, before[case], after[case], absolute))
    return found


def _compared(case: str, name: str, old: dict[str, dict], new: dict[str, dict], absolute: bool) -> Compared:
    if new[name]["status"] in ("refused", "failed"):
        return Compared(case=case, implementation=name, what=f"{new[name]['status']}: {new[name]['reason']}")
    if "rounds_ms" not in new[name]:  # left out, or missing on that machine
        return Compared(case=case, implementation=name)

    def rounds(rows: dict[str, dict]) -> tuple[list[float], list[float]]:
        times = rows[name]["rounds_ms"]
        return times, [1.0] * len(times) if absolute else rows[_YARDSTICK]["rounds_ms"]

    value, interval = ratio_of_ratios(rounds(old), rounds(new))
    noise = max(old[name]["noise"], new[name]["noise"])
    kept = new[name]["saved_mib"] / old[name]["saved_mib"] if old[name]["saved_mib"] else None
    return Compared(case=case, implementation=name, ratio=value, interval=interval, noise=noise, kept=kept)


def comparison_text(found: Sequence[Compared], old: Sequence[dict], new: Sequence[dict]) -> str:
    """A line each, what got worse in words at the end."""
    lines = []
    for one in found:
        if one.ratio is None:
            lines.append((one.case, one.implementation, "-", "-", "-", "-", one.what[:60] or "not in the new file"))
            continue
        low, high = one.interval
        verdict = "SLOWER" if one.is_slower else "faster" if one.is_faster else "same"
        verdict += ", KEEPS MORE" if one.keeps_more else ""
        kept = "-" if one.kept is None else f"{one.kept:.3f}"
        lines.append(
            (
                one.case,
                one.implementation,
                f"{one.ratio:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{one.noise:.1%}",
                kept,
                verdict,
            )
        )
    text = table(("case", "implementation", "new / old", "99 % interval", "noise", "kept", ""), lines)
    devices = [{row.get("device") for row in rows} for rows in (old, new)]
    if devices[0] != devices[1]:
        text.append(f"different devices: {', '.join(map(str, devices[0]))} and {', '.join(map(str, devices[1]))}")
    worse = sum(one.is_worse for one in found)
    text.append(f"{worse} of {len(found)} got worse" if worse else f"none of {len(found)} got worse beyond the noise")
    return "\n".join(text)

"""The study's table: which columns it has, how their numbers read, and its form on a terminal."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mmpeft_fast.study.cells import NO_METHOD, cell_name
from mmpeft_fast.study.rows import SUCCESS

MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, what it shows of a row, and what rows are sorted by."""

    title: str
    text: Callable[[dict], str]
    value: Callable[[dict], float | str | None]
    is_number: bool = True


def count(value: float | None) -> str:
    """1234567 -> 1.23 M; below ten thousand the number itself."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(size, 1e4):
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def decimal(value: float | None, digits: int, unit: str = "") -> str:
    """A number with so many digits after the point, and its unit."""
    return MISSING if value is None else f"{value:.{digits}f}{unit}"


def time_ratio(row: dict) -> float | None:
    """The row's step time over the frozen step's, both from the row's own process."""
    if row["step_ms_p50"] is None:
        return None
    return row["step_ms_p50"] / row["frozen_step_ms_p50"]


def memory_ratio(row: dict, frozen: dict | None, name: str) -> float | None:
    """The row's `saved_mib` or `peak_mib` over that of its model's frozen row; None where either is missing."""
    if frozen is None or row[name] is None or not frozen[name]:
        return None
    return row[name] / frozen[name]


def frozen_rows(rows: list[dict]) -> dict[str, dict]:
    """Each model's frozen row."""
    return {row["model"]: row for row in rows if row["implementation"] == "frozen" and not row["axis"]}


def _losses(row: dict) -> str:
    if row["loss_first"] is None:
        return MISSING
    return f"{row['loss_first']:.3f} → {row['loss_last']:.3f}"


def _accuracy(row: dict) -> str:
    return MISSING if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"


def _measured(title: str, name: str, show: Callable[[float | None], str]) -> Column:
    return Column(title=title, text=lambda row: show(row[name]), value=lambda row: row[name])


def _words(title: str, text: Callable[[dict], str]) -> Column:
    return Column(title=title, text=text, value=text, is_number=False)


LOSS = Column(title="loss first → last", text=_losses, value=lambda row: row["loss_last"])
COLUMNS = (
    _words("model", lambda row: row["model"]),
    _words("method", lambda row: MISSING if row["method"] == NO_METHOD else row["method"]),
    _words("implementation", lambda row: row["implementation"]),
    _words("varied", lambda row: f"{row['axis']} {row['value']}".strip() or MISSING),
    _measured("trainable", "trainable_params", count),
    _measured("step ms", "step_ms_p50", partial(decimal, digits=1)),
    Column(title="× frozen", text=lambda row: decimal(time_ratio(row), 2), value=time_ratio),
    _measured("saved MiB", "saved_mib", partial(decimal, digits=1)),
    _measured("peak MiB", "peak_mib", partial(decimal, digits=1)),
    LOSS,
    Column(title="accuracy", text=_accuracy, value=lambda row: row["accuracy"]),
    _words("status", lambda row: row["status"]),
)


def terminal_table(rows: list[dict]) -> str:
    """The rows as an aligned table, models set apart by a blank line, with the failed rows' reasons under it."""
    lines = [[column.title for column in COLUMNS]] + [[column.text(row) for column in COLUMNS] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    text = ["  ".join(_aligned(cells, widths)).rstrip() for cells in lines]
    text.insert(1, "  ".join("─" * width for width in widths))
    starts = [index for index in range(1, len(rows)) if rows[index]["model"] != rows[index - 1]["model"]]
    for index in reversed(starts):
        text.insert(index + 2, "")
    return "\n".join(text + _failures(rows))


def _failures(rows: list[dict]) -> list[str]:
    """A line for each reason, with the cells that failed for it."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != SUCCESS:
            cells.setdefault(row["reason"], []).append(cell_name(row))
    lines = [f"failed: {names[0]}{_and_more(names)}: {reason}" for reason, names in cells.items()]
    return ["", *lines] if lines else []


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _aligned(cells: list[str], widths: list[int]) -> list[str]:
    return [
        cell.rjust(width) if column.is_number else cell.ljust(width)
        for cell, width, column in zip(cells, widths, COLUMNS)
    ]

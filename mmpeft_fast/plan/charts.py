"""Line charts of a sweep as SVG, alone or in an HTML page: tokens a second and peak memory."""

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import Any

WIDTH, HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 44
_COLOURS = ("#0b6e99", "#c2571a", "#4c8c3f", "#8a4fa3", "#b8860b", "#aa3355", "#4a5568", "#00897b")
_TICKS = 5
_MOST_X_TICKS = 10
_METRICS = (
    ("tokens_per_s", "tokens / s", 1.0, None),
    ("peak_bytes", "peak memory, GiB", 1 / 2**30, "memory"),
    ("step_ms", "step, ms", 1.0, None),
)
_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#333}.title{font-size:13px;font-weight:600}.axis{stroke:#999}"
    ".grid{stroke:#e5e5e5}.limit{stroke:#c00;stroke-dasharray:4 3}polyline{fill:none;stroke-width:2}"
)


def sweep_svg(rows: Sequence[dict[str, Any]], names: Sequence[str], *, title: str, memory_bytes: int | None) -> str:
    """The charts of a sweep, one below the other.

    Args:
        rows: as `sweep.rows_of` gives them.
        names: the swept names; the first with numbers is the horizontal axis, each combination of the others a line.
        title: above the charts.
        memory_bytes: of the device, a line in the memory chart; None where the sweep has several devices.

    Raises:
        ValueError: no swept name has numbers.
    """
    across = next((name for name in names if all(_is_number(row[name]) for row in rows)), None)
    if across is None:
        raise ValueError(f"--plot: expected a swept name with numbers, got {list(names)}")
    series: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label = ", ".join(f"{name} {row[name]}" for name in names if name != across)
        series.setdefault(label, []).append(row)
    charts = []
    for i, (metric, label, factor, limit) in enumerate(_METRICS):
        lines = {
            name: [(row[across], row[metric] * factor) for row in sorted(members, key=lambda row: row[across])]
            for name, members in series.items()
        }
        most = memory_bytes * factor if limit and memory_bytes else None
        charts.append(f'<g transform="translate(0 {24 + i * HEIGHT})">{line_chart(lines, across, label, most)}</g>')
    legend, legend_height = _legend(list(series))
    top = 24 + len(_METRICS) * HEIGHT
    height = top + legend_height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}"><style>{_STYLE}</style>'
        f'<text class="title" x="8" y="16">{escape(title)}</text>{"".join(charts)}'
        f'<g transform="translate(0 {top})">{legend}</g></svg>\n'
    )


def sweep_html(svg: str, title: str, table_text: str) -> str:
    """A page with the charts and the table under them."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<body>{svg}<pre>{escape(table_text)}</pre></body></html>\n"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` (or just below it) to at least `high`."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / _TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= _TICKS)
    first = math.floor(low / step)
    return [step * i for i in range(first, first + math.ceil((high - first * step) / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every power of ten within a decade or two, else powers of ten; around `low` to `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1,)
    found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    start = max((i for i, tick in enumerate(found) if tick <= low), default=0)
    end = next((i for i, tick in enumerate(found) if tick >= high), len(found) - 1)
    return found[start : max(end, start + 1) + 1]


def _share(value: float, low: float, high: float, is_log: bool) -> float:
    """Where a value lies between the ends of an axis, 0 to 1."""
    if is_log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / ((high - low) or 1.0)


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    across: str,
    label: str,
    limit: float | None = None,
    *,
    is_log: bool = False,
    unjoined: Collection[str] = (),
    colours: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The shapes of a chart of `WIDTH` x `HEIGHT`: points (x, y) by name, joined by lines.

    Args:
        across, label: what x and y are.
        limit: a y to mark.
        is_log: both axes have logarithmic scales; all numbers are positive then.
        unjoined: names whose points stand alone.
        colours: by name; the others take the chart's own.
    """
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points] + ([limit] if limit else [])
    x_ticks = xs if not is_log or (len(xs) <= _MOST_X_TICKS and not unjoined) else _log_ticks(xs[0], xs[-1])
    y_ticks = _log_ticks(min(ys), max(ys)) if is_log else ticks(0.0, max(ys) or 1.0)
    left, right = min(xs[0], x_ticks[0]), max(xs[-1], x_ticks[-1])
    low = y_ticks[0] if is_log else 0.0
    inner_width, inner_height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + _share(x, left, right, is_log) * inner_width,
            _TOP + (1 - _share(y, low, y_ticks[-1], is_log)) * inner_height,
        )

    shapes = [f'<text class="title" x="{_LEFT}" y="{_TOP - 12}">{escape(label)}</text>']
    for y in y_ticks:
        _, height = at(left, y)
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        place, _ = at(x, y_ticks[-1])
        anchor = "end" if place > WIDTH - 2 * _RIGHT and x >= 1000 else "middle"
        shapes.append(f'<text x="{place:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}">{x:g}</text>')
    shapes.append(
        f'<text x="{_LEFT + inner_width / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>'
    )
    if limit:
        _, height = at(left, limit)
        shapes.append(f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
    for i, (name, points) in enumerate(lines.items()):
        colour = colours.get(name, _COLOURS[i % len(_COLOURS)])
        places = [at(*point) for point in points]
        if name not in unjoined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            shapes.append(f'<polyline points="{path}" style="stroke:{colour}"/>')
        for (x, y), point in zip(places, points, strict=True):
            said = escape(f"{name} {across} {point[0]:g}: {point[1]:.4g}".strip())
            circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{colour}"><title>{said}</title></circle>'
            shapes.append(circle)
    return "".join(shapes)


def _legend(names: list[str]) -> tuple[str, int]:
    """The lines' names and the height they take."""
    shapes = []
    for i, name in enumerate(name for name in names if name):
        colour = _COLOURS[i % len(_COLOURS)]
        shapes.append(f'<rect x="{_LEFT}" y="{i * 18 + 3}" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{_LEFT + 18}" y="{i * 18 + 13}">{escape(name)}</text>')
    return "".join(shapes), 18 * len(shapes) // 2 + 8

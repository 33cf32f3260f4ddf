"""Line charts of a sweep as SVG, alone or in an HTML page: tokens a second and peak memory."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 44
_COLOURS = ("#0b6e99", "#c2571a", "#4c8c3f", "#8a4fa3", "#b8860b", "#aa3355", "#4a5568", "#00897b")
_TICKS = 5
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
        charts.append(f'<g transform="translate(0 {24 + i * _HEIGHT})">{_chart(lines, across, label, most)}</g>')
    legend, legend_height = _legend(list(series))
    top = 24 + len(_METRICS) * _HEIGHT
    height = top + legend_height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
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


def _chart(lines: dict[str, list[tuple[float, float]]], across: str, label: str, limit: float | None) -> str:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points] + ([limit] if limit else [])
    left, right = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    y_ticks = ticks(0.0, max(ys) or 1.0)
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - left) / (right - left) * inner_width,
            _TOP + (1 - y / y_ticks[-1]) * inner_height,
        )

    shapes = [f'<text class="title" x="{_LEFT}" y="{_TOP - 12}">{escape(label)}</text>']
    for y in y_ticks:
        _, height = at(left, y)
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        shapes.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in sorted(set(xs)):
        place, _ = at(x, 0)
        shapes.append(f'<text x="{place:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    shapes.append(
        f'<text x="{_LEFT + inner_width / 2:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>'
    )
    if limit:
        _, height = at(left, limit)
        shapes.append(f'<line class="limit" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
    for i, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        places = [at(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shapes.append(f'<polyline points="{path}" stroke="{colour}"/>')
        for (x, y), point in zip(places, points, strict=True):
            said = escape(f"{name} {across} {point[0]:g}: {point[1]:.4g}".strip())
            shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{said}</title></circle>')
    return "".join(shapes)


def _legend(names: list[str]) -> tuple[str, int]:
    """The lines' names and the height they take."""
    shapes = []
    for i, name in enumerate(name for name in names if name):
        colour = _COLOURS[i % len(_COLOURS)]
        shapes.append(f'<rect x="{_LEFT}" y="{i * 18 + 3}" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{_LEFT + 18}" y="{i * 18 + 13}">{escape(name)}</text>')
    return "".join(shapes), 18 * len(shapes) // 2 + 8

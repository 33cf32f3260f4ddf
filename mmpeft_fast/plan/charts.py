"""Line charts of a sweep as SVG, alone or in an HTML page: tokens a second and peak memory."""

from collections.abc import Sequence
from html import escape
from typing import Any

from mmpeft_fast.pages.lines import COLOURS, HEIGHT, LEFT, WIDTH, line_chart

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


def _legend(names: list[str]) -> tuple[str, int]:
    """The lines' names and the height they take."""
    shapes = []
    for i, name in enumerate(name for name in names if name):
        colour = COLOURS[i % len(COLOURS)]
        shapes.append(f'<rect x="{LEFT}" y="{i * 18 + 3}" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{LEFT + 18}" y="{i * 18 + 13}">{escape(name)}</text>')
    return "".join(shapes), 18 * len(shapes) // 2 + 8

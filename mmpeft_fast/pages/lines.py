"""Line charts: named series over a common horizontal axis."""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from types import MappingProxyType

from mmpeft_fast.pages.svg import ticks

WIDTH, HEIGHT = 460, 300
LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 44
COLOURS = ("#0b6e99", "#c2571a", "#4c8c3f", "#8a4fa3", "#b8860b", "#aa3355", "#4a5568", "#00897b")
_MOST_X_TICKS = 10


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


def _x_ticks(xs: Sequence[float], *, is_log: bool, is_joined: bool) -> Sequence[float]:
    """The points' own places where their numbers have room beside one another, else round ones."""
    if is_log:
        return xs if len(xs) <= _MOST_X_TICKS and is_joined else _log_ticks(xs[0], xs[-1])
    shares = [_share(x, xs[0], xs[-1], is_log=False) for x in xs]
    has_room = all(right - left > 1 / _MOST_X_TICKS for left, right in itertools.pairwise(shares))
    return xs if has_room else ticks(xs[0], xs[-1])


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
    x_ticks = _x_ticks(xs, is_log=is_log, is_joined=not unjoined)
    y_ticks = _log_ticks(min(ys), max(ys)) if is_log else ticks(0.0, max(ys) or 1.0)
    left, right = min(xs[0], x_ticks[0]), max(xs[-1], x_ticks[-1])
    low = y_ticks[0] if is_log else 0.0
    inner_width, inner_height = WIDTH - LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + _share(x, left, right, is_log) * inner_width,
            _TOP + (1 - _share(y, low, y_ticks[-1], is_log)) * inner_height,
        )

    shapes = [f'<text class="title" x="{LEFT}" y="{_TOP - 12}">{escape(label)}</text>']
    for y in y_ticks:
        _, height = at(left, y)
        shapes.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        shapes.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        place, _ = at(x, y_ticks[-1])
        anchor = "end" if place > WIDTH - 2 * _RIGHT and x >= 1000 else "middle"
        shapes.append(f'<text x="{place:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="{anchor}">{x:g}</text>')
    shapes.append(
        f'<text x="{LEFT + inner_width / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>'
    )
    if limit:
        _, height = at(left, limit)
        shapes.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
    for i, (name, points) in enumerate(lines.items()):
        colour = colours.get(name, COLOURS[i % len(COLOURS)])
        places = [at(*point) for point in points]
        if name not in unjoined:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            shapes.append(f'<polyline points="{path}" style="stroke:{colour}"/>')
        for (x, y), point in zip(places, points, strict=True):
            said = escape(f"{name} {across} {point[0]:g}: {point[1]:.4g}".strip())
            circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" style="fill:{colour}"><title>{said}</title></circle>'
            shapes.append(circle)
    return "".join(shapes)

"""A chart of named points, with a line along those that no other beats in both directions."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from mmpeft_fast.pages.svg import LETTER, svg, text, ticks

_WIDTH, _HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 30, 42
_LINE = 14.0  # between names, so that none lies on another


class Point(NamedTuple):
    name: str
    x: float
    y: float


def points_chart(title: str, points: Sequence[Point], across: str, up: str, *, less_is_better: bool) -> str:
    """An SVG element; more y is better.

    Args:
        title: read out to those who do not see the picture.
        points: at least one.
        across, up: what x and y are.
        less_is_better: of x.
    """
    x_ticks = ticks(min(p.x for p in points) * 0.98, max(p.x for p in points) * 1.02)
    y_ticks = ticks(0.0, max(max(p.y for p in points), 1.0))
    left, right, high = x_ticks[0], x_ticks[-1], y_ticks[-1]

    def at(point: Point) -> tuple[float, float]:
        return (
            _LEFT + (point.x - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT),
            _TOP + (1 - point.y / high) * (_HEIGHT - _TOP - _BOTTOM),
        )

    shapes = [text(0, 8, up, "start"), text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 8, across, "middle")]
    for tick in y_ticks:
        _, y = at(Point("", left, tick))
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(text(_LEFT - 6, y, f"{tick:g}", "end"))
    for tick in x_ticks:
        x, _ = at(Point("", tick, 0.0))
        shapes.append(text(x, _HEIGHT - _BOTTOM + 14, f"{tick:g}", "middle" if tick < right else "end"))
    path = " ".join("{:.1f},{:.1f}".format(*at(point)) for point in best_points(points, less_is_better=less_is_better))
    shapes.append(f'<polyline class="best" points="{path}"/>')
    places = [at(point) for point in points]
    for point, (x, y), (name_x, name_y, anchor) in zip(points, places, _name_places(points, places)):
        said = escape(f"{point.name}: {up} {point.y:.1f}, {across} {point.x:.4g}")
        shapes.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{said}</title></circle>')
        shapes.append(text(name_x, name_y, point.name, anchor, "value"))
    spoken = "; ".join(f"{point.name} {point.y:.1f} at {point.x:.4g}" for point in points)
    return svg(_WIDTH, _HEIGHT, f"{title}, {up} at {across}: {spoken}", shapes)


def best_points(points: Sequence[Point], *, less_is_better: bool) -> list[Point]:
    """Those that no other point beats in x and y, by x (the Pareto front)."""
    sign = 1 if less_is_better else -1
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (sign * p.x, -p.y)):
        if not found or point.y > found[-1].y:
            found.append(point)
    return sorted(found, key=lambda p: p.x)


def _name_places(points: Sequence[Point], places: Sequence[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """(x, y, anchor) of each name: beside its point if it lies on no other point or name there, else higher."""
    taken = [(x - 6, x + 6, y) for x, y in places]
    found = []
    for point, (x, y) in zip(points, places):
        width = LETTER * len(point.name)
        sides = [side for side in ((x + 9, "start"), (x - 9, "end")) if _fits(side, width)]
        candidates = [(side, y - step * _LINE / 2) for step in range(2 * len(points) + 2) for side in sides]
        for (name_x, anchor), name_y in candidates:
            left = name_x if anchor == "start" else name_x - width
            if not any(left < end and start < left + width and abs(name_y - at) < _LINE for start, end, at in taken):
                break
        taken.append((left, left + width, name_y))
        found.append((name_x, name_y, anchor))
    return found


def _fits(side: tuple[float, str], width: float) -> bool:
    x, anchor = side
    return x + width <= _WIDTH if anchor == "start" else x - width >= _LEFT

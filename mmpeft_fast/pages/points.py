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
    for point, name_y in zip(points, _name_heights([at(point)[1] for point in points])):
        x, y = at(point)
        said = escape(f"{point.name}: {up} {point.y:.1f}, {across} {point.x:.4g}")
        shapes.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{said}</title></circle>')
        fits = x + 9 + LETTER * len(point.name) < _WIDTH
        shapes.append(text(x + 9 if fits else x - 9, name_y, point.name, "start" if fits else "end", "value"))
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


def _name_heights(heights: Sequence[float]) -> list[float]:
    """Where names go that want to be at `heights`: moved up from the lowest until none lies on another."""
    moved = list(heights)
    last = float("inf")
    for i in sorted(range(len(heights)), key=lambda i: -heights[i]):
        moved[i] = last = min(heights[i], last - _LINE)
    return moved

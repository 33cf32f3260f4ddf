"""SVG for the report: stacked areas of memory by role."""

from collections.abc import Sequence

from mmpeft_fast.pages.svg import css_name, svg, text, ticks
from mmpeft_fast.profiling.storages import ROLES, Timeline

_WIDTH = 420
_AREA_HEIGHT, _AREA_LEFT, _AREA_RIGHT, _AREA_TOP, _AREA_BOTTOM = 240, 52, 8, 24, 26
_POINTS = 300
_MOST_PHASES = 6  # of several steps they would hide the areas
_MIB = 2**20


def memory_areas(label: str, timeline: Timeline, most_bytes: int) -> str:
    """Bytes alive by role over the ops of a run, the peak marked.

    Args:
        most_bytes: what the axis reaches at least, so that several charts compare.
    """
    shown = timeline.thinned(_POINTS)
    marks = ticks(0.0, (max(most_bytes, timeline.peak_bytes) or 1) / _MIB)
    last = max(shown.positions, default=0) or 1
    inner_width, inner_height = _WIDTH - _AREA_LEFT - _AREA_RIGHT, _AREA_HEIGHT - _AREA_TOP - _AREA_BOTTOM

    def across(position: int) -> float:
        return _AREA_LEFT + position / last * inner_width

    def above(nbytes: float) -> float:
        return _AREA_TOP + (1 - nbytes / _MIB / marks[-1]) * inner_height

    shapes = []
    for value in marks:
        y = above(value * _MIB)
        shapes.append(f'<line class="grid" x1="{_AREA_LEFT}" x2="{_WIDTH - _AREA_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        shapes.append(text(_AREA_LEFT - 6, y, f"{value:g}", "end", "tick"))
    floor = [0] * len(shown.positions)
    for i, role in enumerate(ROLES):
        top = [low + point[i] for low, point in zip(floor, shown.bytes, strict=True)]
        if any(point[i] for point in shown.bytes):
            corners = _steps(shown.positions, top) + _steps(shown.positions, floor)[::-1]
            points = " ".join(f"{across(position):.1f},{above(nbytes):.1f}" for position, nbytes in corners)
            shapes.append(f'<polygon class="{css_name(role)}" points="{points}"><title>{role}</title></polygon>')
        floor = top
    if len(timeline.phases) <= _MOST_PHASES:
        for position, phase in timeline.phases:
            x = across(min(position, last))
            shapes.append(
                f'<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{_AREA_TOP}" y2="{_AREA_HEIGHT - _AREA_BOTTOM}"/>'
            )
            shapes.append(text(x + 3, _AREA_HEIGHT - _AREA_BOTTOM - 9, phase, "start", "phase"))
    if timeline.bytes:
        x, y = across(timeline.positions[timeline.peak_idx]), above(timeline.peak_bytes)
        shapes.append(f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        anchor = "end" if x > _WIDTH * 0.7 else "start" if x < _WIDTH * 0.3 else "middle"
        shapes.append(text(x, y - 11, f"peak {timeline.peak_bytes / _MIB:.1f} MiB", anchor))
    shapes.append(text(_AREA_LEFT, _AREA_HEIGHT - 9, "MiB, over the ops of a run", "start", "tick"))
    shapes.append(text(_WIDTH - _AREA_RIGHT, _AREA_HEIGHT - 9, f"{last} ops", "end", "tick"))
    held = ", ".join(f"{role} {size / _MIB:.1f}" for role, size in timeline.peak_by_role().items())
    spoken = f"{label}: peak {timeline.peak_bytes / _MIB:.1f} MiB, of it {held}"
    return svg(_WIDTH, _AREA_HEIGHT, spoken, shapes)


def _steps(positions: Sequence[int], values: Sequence[float]) -> list[tuple[int, float]]:
    """A line that keeps each value until the next position."""
    if not positions:
        return []
    corners = [(positions[0], values[0])]
    for before, position, value in zip(values, positions[1:], values[1:], strict=False):
        corners += [(position, before), (position, value)]
    return corners

"""Inline SVG for the report: grouped bars against the frozen model's 1.0, values by name with their mean, and the small
curve of a row's losses."""

import statistics
from collections.abc import Mapping, Sequence
from html import escape

from mmpeft_fast.pages.svg import svg, text

WIDTH = 380
LABEL_WIDTH = 112  # method names on the left
VALUE_WIDTH = 48  # the number behind the longest bar
BAR_HEIGHT = 12
BAR_GAP = 2
GROUP_GAP = 13
TOP = 22  # room for the frozen line's label
BASELINE = 8  # what the frozen line reaches below the last bar
SPARK_WIDTH, SPARK_HEIGHT = 64, 18


def ratio_chart(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float | None]]]]) -> str:
    """Horizontal bars of ratios, 1.0 marked as the frozen model.

    Args:
        title: what the ratios are of; read out to those who do not see the picture.
        groups: (label, bars) from top to bottom; a bar is (CSS class, ratio), None where there is no number.

    Returns:
        an SVG element coloured by the page's style sheet.
    """
    largest = max([1.0] + [ratio for _, bars in groups for _, ratio in bars if ratio is not None])
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / largest
    shapes, y = [], float(TOP)
    for label, bars in groups:
        height = len(bars) * (BAR_HEIGHT + BAR_GAP) - BAR_GAP
        shapes.append(text(LABEL_WIDTH - 10, y + height / 2, label, "end", "label"))
        for name, ratio in bars:
            shapes += _bar(y, name, ratio, scale)
            y += BAR_HEIGHT + BAR_GAP
        y += GROUP_GAP - BAR_GAP
    bottom = y - GROUP_GAP + BASELINE
    line_x = LABEL_WIDTH + scale
    line = f'<line class="frozen" x1="{line_x:.1f}" x2="{line_x:.1f}" y1="{TOP - 6}" y2="{bottom:.0f}"/>'
    # The line lies over the bars and under the numbers.
    shapes = [shape for shape in shapes if "<rect" in shape] + [line] + [shape for shape in shapes if "<text" in shape]
    # Near the right edge the label would be cut, so it ends at the line there.
    anchor = "end" if line_x > WIDTH - 60 else "middle"
    shapes.append(text(line_x, 9, "frozen = 1", anchor, "tick"))
    return svg(WIDTH, bottom + 2, _spoken(title, groups), shapes)


def spread_chart(title: str, values: Mapping[str, Sequence[float]]) -> str:
    """A dot for each value 0 to 100, a bar from zero to their mean, and mean and standard deviation in numbers.

    Args:
        title: read out to those who do not see the picture.
        values: at least one by name, from top to bottom.

    Returns:
        an SVG element coloured by the page's style sheet.
    """
    shapes, spoken, room = [], [], 96
    scale = (WIDTH - LABEL_WIDTH - room) / 100
    for index, (name, found) in enumerate(values.items()):
        y = 4 + index * 30
        mean, told = statistics.fmean(found), mean_and_deviation(found)
        shapes.append(text(LABEL_WIDTH - 10, y + 9, name, "end", "label"))
        shapes.append(
            f'<rect class="spread" x="{LABEL_WIDTH}" y="{y}" width="{max(mean * scale, 1.0):.1f}" height="18" rx="2"/>'
        )
        for value in found:
            x = LABEL_WIDTH + value * scale
            shapes.append(
                f'<circle class="point" cx="{x:.1f}" cy="{y + 9}" r="3.5"><title>{value:.1f}</title></circle>'
            )
        shapes.append(text(LABEL_WIDTH + max(mean, *found) * scale + 8, y + 9, told, "start", "value"))
        spoken.append(f"{name} {told}")
    return svg(WIDTH, 30 * len(values), f"{title}: {'; '.join(spoken)}", shapes)


def mean_and_deviation(values: Sequence[float]) -> str:
    """98.2 ± 0.7, the sample's standard deviation; of one value itself."""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def sparkline(values: Sequence[float]) -> str:
    """The course of a row's losses as a small curve, scaled to its own range."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    step = SPARK_WIDTH / max(len(values) - 1, 1)
    points = " ".join(
        f"{index * step:.1f},{2 + (high - value) / span * (SPARK_HEIGHT - 4):.1f}" for index, value in enumerate(values)
    )
    spoken = f"loss from {values[0]:.3f} to {values[-1]:.3f} in {len(values)} steps"
    return (
        f'<svg class="spark" viewBox="0 0 {SPARK_WIDTH} {SPARK_HEIGHT}" width="{SPARK_WIDTH}" height="{SPARK_HEIGHT}" '
        f'role="img" aria-label="{spoken}"><polyline points="{points}"/></svg>'
    )


def _bar(y: float, name: str, ratio: float | None, scale: float) -> list[str]:
    """A bar and its number, or the word that there is none."""
    middle = y + BAR_HEIGHT / 2
    if ratio is None:
        return [text(LABEL_WIDTH, middle, f"{name}: no number", "start", "missing")]
    width = max(ratio * scale, 1.0)
    bar = (
        f'<rect class="{name}" x="{LABEL_WIDTH}" y="{y:.1f}" width="{width:.1f}" height="{BAR_HEIGHT}" rx="2">'
        f"<title>{escape(name)}: {ratio:.3f}</title></rect>"
    )
    return [bar, text(LABEL_WIDTH + width + 6, middle, f"{ratio:.2f}×", "start", f"value {name}")]


def _spoken(title: str, groups: Sequence[tuple[str, Sequence[tuple[str, float | None]]]]) -> str:
    """The chart in words."""
    parts = [
        f"{label} {name} {'no number' if ratio is None else f'{ratio:.2f}'}"
        for label, bars in groups
        for name, ratio in bars
    ]
    return f"{title}, frozen is 1: {'; '.join(parts)}"

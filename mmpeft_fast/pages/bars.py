"""Bar charts: horizontal bars of stacked values."""

from collections.abc import Mapping
from html import escape

from mmpeft_fast.pages.svg import LETTER, css_name, readable, svg, text

_WIDTH = 420
_LABEL, _VALUE, _HEIGHT, _GAP = 62, 74, 24, 12


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Horizontal bars of stacked values.

    Args:
        title: read out to those who do not see the picture.
        bars: label -> (class -> value), from top to bottom and left to right.
        unit: behind a bar's sum.
    """
    largest = max((sum(values.values()) for values in bars.values()), default=0.0) or 1.0
    label_width = max(_LABEL, 16 + LETTER * max(map(len, bars), default=0))
    scale = (_WIDTH - label_width - _VALUE) / largest
    shapes = []
    for i, (label, values) in enumerate(bars.items()):
        x, y = float(label_width), i * (_HEIGHT + _GAP)
        shapes.append(text(label_width - 10, y + _HEIGHT / 2, label, "end"))
        for name, value in values.items():
            shapes.append(
                f'<rect class="{css_name(name)}" x="{x:.2f}" y="{y}" width="{value * scale:.2f}" '
                f'height="{_HEIGHT}"><title>{escape(name)}: {value:.3f} {unit}</title></rect>'
            )
            x += value * scale
        shapes.append(text(x + 6, y + _HEIGHT / 2, f"{readable(sum(values.values()))} {unit}", "start"))
    height = len(bars) * (_HEIGHT + _GAP) - _GAP
    spoken = "; ".join(f"{label} {readable(sum(values.values()))} {unit}" for label, values in bars.items())
    return svg(_WIDTH, height, f"{title}: {spoken}", shapes)

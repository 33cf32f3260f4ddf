"""What all charts are made of: names, numbers, ticks, words and the element around them."""

import math
from collections.abc import Sequence
from html import escape

LETTER = 7  # the width of a letter, about
_NUM_TICKS = 5


def css_name(name: str) -> str:
    """A part or role as the style sheet's class."""
    return name.replace(" ", "-")


def readable(value: float) -> str:
    """Three digits, never an exponent: 0.123, 45.6, 1,388."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` (or just below it) to at least `high`."""
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / _NUM_TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= _NUM_TICKS)
    first = math.floor(low / step)
    return [step * i for i in range(first, first + math.ceil((high - first * step) / step - 1e-9) + 1)]


def svg(width: int, height: float, spoken: str, shapes: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{escape(spoken, quote=True)}">'
        f"{''.join(shapes)}</svg>"
    )


def text(x: float, y: float, words: str, anchor: str, name: str = "") -> str:
    kind = f' class="{name}"' if name else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" dy=".35em" text-anchor="{anchor}">{escape(words)}</text>'

"""How cost grows along an axis: exponents fitted to time and kept bytes, and where the fused path stops winning."""

import math
from collections.abc import Mapping, Sequence

AXES = {"tokens": "seq_len", "rank": "rank", "layers": "layers"}  # axis -> field of a row


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """b of y = a x^b, by least squares over logarithms.

    Raises:
        ValueError: fewer than two sizes.
    """
    if len(set(xs)) < 2:
        raise ValueError(f"exponent: expected at least two sizes, got {sorted(set(xs))}")
    us, vs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    u, v = sum(us) / len(us), sum(vs) / len(vs)
    return sum((a - u) * (b - v) for a, b in zip(us, vs, strict=True)) / sum((a - u) ** 2 for a in us)


def series(rows: Sequence[Mapping], axis: str, value: str) -> dict[str, list[tuple[float, float]]]:
    """implementation -> (size, value) in the order of sizes, of the rows of one axis that have the value."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if row.get("growth") == axis and value in row:
            found.setdefault(row["implementation"], {})[row[AXES[axis]]] = row[value]  # the newest
    return {name: sorted(points.items()) for name, points in found.items()}


def growth_lines(rows: Sequence[Mapping], axis: str) -> list[str]:
    """One sentence an implementation, and one about the fused path beside HF PEFT."""
    times, kept = series(rows, axis, "p50_ms"), series(rows, axis, "saved_mib")
    lines = []
    for name, points in times.items():
        if len(points) < 2:
            continue
        slopes = [exponent(*zip(*found, strict=True)) for found in (points, kept[name]) if all(y > 0 for _, y in found)]
        says = f"time grows as {axis}^{slopes[0]:.2f}"
        if len(slopes) > 1:
            says += f", kept bytes as {axis}^{slopes[1]:.2f}"
        lines.append(f"{axis}: {name:10} {says} ({points[0][0]} to {points[-1][0]})")
    if {"fused", "peft"} <= times.keys():
        peft = dict(times["peft"])
        lost = [size for size, ms in times["fused"] if size in peft and ms >= peft[size]]
        text = (
            f"is no faster than peft at {axis} {', '.join(map(str, lost))}"
            if lost
            else "is faster than peft throughout"
        )
        lines.append(f"{axis}: fused {text}")
    return lines

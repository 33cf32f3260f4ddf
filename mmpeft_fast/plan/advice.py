"""Answers beside a plan: the largest batch or length that fits, and which change buys the most memory or time."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from mmpeft_fast.methods import make_method
from mmpeft_fast.models.images import ImageShape
from mmpeft_fast.models.inputs import image_shape, least_length
from mmpeft_fast.plan.prediction import Plan, plan
from mmpeft_fast.plan.request import Request

_RANKS = ("r", "bottleneck", "num_virtual_tokens")
_LENGTH_STEP = 64  # lengths are answered in multiples of it
_BISECT_EVERY = 4  # trials, so that a bent line costs logarithmically many
MOST_SAMPLES, MOST_TOKENS = 1024, 32768


def largest_that_fits(
    peak: Callable[[int], float], room: float, *, known: tuple[int, float], low: int, most: int
) -> int:
    """The largest integer from `low` to `most` whose peak is at most `room`, low - 1 where there is none.

    Peaks grow with the integer, nearly in a line: the next trial is where the line through the last two meets `room`.

    Args:
        known: an integer and its peak.
    """
    below, above, points = low - 1, most + 1, [known]
    guess = known[0] * room / known[1]
    while above - below > 1:
        nearest = below + 1 if len(points) % _BISECT_EVERY else (below + above) // 2
        probe = max(nearest, min(above - 1, int(guess)))
        value = peak(probe)
        if value <= room:
            below = probe
        else:
            above = probe
        (x, y), last = points[-1], (probe, value)
        points.append(last)
        slope = (value - y) / (probe - x) if probe != x else 0.0
        guess = probe + (room - value) / slope if slope > 0 else most
    return below


def _room(planned: Plan) -> int:
    """Bytes that tensors may take."""
    return planned.device.memory_bytes - planned.device.reserve_bytes


def largest_batch(planned: Plan) -> int:
    """The largest batch size of this request that fits the device, up to MOST_SAMPLES; 0 where not even one does."""
    return largest_that_fits(
        lambda size: _with(planned, batch_size=size).counts.peak_bytes,
        _room(planned),
        known=(planned.request.batch_size, planned.counts.peak_bytes),
        low=1,
        most=MOST_SAMPLES,
    )


def largest_length(planned: Plan) -> int:
    """The largest length of this request that fits the device: a multiple of 64 up to MOST_TOKENS, or 0."""
    request = planned.request
    shape = image_shape(request.config(), request.image_size) if request.images else ImageShape(())
    low = -(-least_length(shape, request.images) // _LENGTH_STEP)
    steps = largest_that_fits(
        lambda steps: _with(planned, seq_len=steps * _LENGTH_STEP).counts.peak_bytes,
        _room(planned),
        known=(request.seq_len // _LENGTH_STEP, planned.counts.peak_bytes),
        low=low,
        most=max(low, MOST_TOKENS // _LENGTH_STEP),
    )
    return 0 if steps < low else steps * _LENGTH_STEP


class Change(NamedTuple):
    """A change of the request and what it does: differences of peak bytes and of step seconds, negative = less."""

    name: str
    peak_bytes: int
    seconds: float


def changes(planned: Plan) -> list[Change]:
    """Changes worth considering, the one first that saves most memory where the plan does not fit, most time where it
    does. Packing is not among them: a plan has no padding."""
    request, found = planned.request, []

    def consider(name: str, **fields) -> None:
        other = _with(planned, **fields)
        found.append(
            Change(
                name,
                other.counts.peak_bytes - planned.counts.peak_bytes,
                other.time.seconds - planned.time.seconds,
            )
        )

    if not request.checkpointing and not _keeps_prefix_in_cache(request):
        consider("activation checkpointing", checkpointing=True, recompute=None)
    if request.implementation == "fused" and not request.checkpointing and request.recompute is None:
        consider("recompute gate and up", recompute="gate_up")
        consider("recompute gate, up, q, k and v", recompute="gate_up+qkv")
    smaller = _smaller_rank(request)
    if smaller is not None:
        consider("half the " + next(iter(smaller)), settings={**request.settings, **smaller})
    if request.implementation == "peft":
        consider("implementation fused", implementation="fused")
    vision_s = planned.part_seconds().get("vision", 0.0)
    if vision_s:
        # The tower runs before the decoder keeps anything, so the peak stays.
        saved_s = vision_s if not planned.time.is_host_bound else 0.0
        found.append(Change("cached vision features", 0, -saved_s))
    if planned.fits:
        return sorted(found, key=lambda change: change.seconds)
    return sorted(found, key=lambda change: change.peak_bytes)


def _keeps_prefix_in_cache(request: Request) -> bool:
    return request.method == "prefix" and request.implementation == "peft"


def _smaller_rank(request: Request) -> dict[str, int] | None:
    """Half of the method's rank, bottleneck or number of virtual tokens."""
    if request.implementation == "frozen":
        return None
    method = make_method(request.method, **request.settings)
    for name in _RANKS:
        if getattr(method, name, 1) > 1:
            return {name: getattr(method, name) // 2}
    return None


def _with(planned: Plan, **fields) -> Plan:
    return plan(dataclasses.replace(planned.request, **fields), planned.device)

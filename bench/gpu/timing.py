"""The one way to time: functions in turn, GPU time by events after a head start of the host, host time beside it.

A function whose launches take the host longer than the GPU is timed as host time, unless they are queued before the
GPU gets to them. So the device is kept busy before every measured call for longer than the host needs to issue it.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch

from bench.rows import quantiles
from mmpeft_fast import provider
from mmpeft_fast.ops.providers import PROVIDERS

# Twice the L2 of the largest GPU so far (B200: 126 MB), so that nothing of a call is left for the next one.
_FLUSH_BYTES = 256 << 20
_FEWEST_ROUNDS = 3
# Of the longest issue time seen: what the next head start is.
_HEAD_START = 1.5
_LEAST_HEAD_START_MS = 0.2
# A driver queues about a thousand launches; what issues longer than this is not held back any longer.
_MOST_HEAD_START_MS = 50.0


class Device(Protocol):
    """What timing needs of a device; a test has one of its own."""

    def now(self) -> float:
        """Seconds on the host's clock."""

    def busy(self, milliseconds: float) -> None:
        """Queues work that takes so long and leaves nothing of the last call in the caches."""

    def mark(self) -> object:
        """Queues a mark."""

    def between(self, start: object, end: object) -> float:
        """Milliseconds on the device between two marks that it has passed."""

    def synchronize(self) -> None: ...


class _Gpu:
    def __init__(self):
        self._buffer: torch.Tensor | None = None
        self._cycles_a_ms = 0.0

    def now(self) -> float:
        return time.perf_counter()

    def busy(self, milliseconds: float) -> None:
        if self._buffer is None:  # not before it is wanted: it would be part of a model's peak
            self._buffer = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
            self._cycles_a_ms = self._calibrated()
        torch.cuda._sleep(int(milliseconds * self._cycles_a_ms))
        self._buffer.zero_()

    def _calibrated(self, cycles: int = 10_000_000) -> float:
        torch.cuda._sleep(1000)
        start = self.mark()
        torch.cuda._sleep(cycles)
        end = self.mark()
        self.synchronize()
        return cycles / self.between(start, end)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start, end) -> float:
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class _Host:
    """A device that has done everything when a call returns: a CPU."""

    def now(self) -> float:
        return time.perf_counter()

    def busy(self, milliseconds: float) -> None:
        pass

    mark = now

    def between(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def synchronize(self) -> None:
        pass


class Times(NamedTuple):
    """Milliseconds of every measured call: on the device, and of the host until all of it was issued."""

    device_ms: list[float]
    host_ms: list[float]

    def row(self) -> dict[str, float]:
        """p20, p50 and p80 of the device's time; the median of the host's."""
        return {**quantiles(self.device_ms), "host_ms": quantiles(self.host_ms)["p50_ms"]}


def device_of(name: str) -> Device:
    return _Gpu() if name == "cuda" else _Host()


def timed(
    functions: Mapping[str, Callable[[], object]],
    device: Device,
    *,
    rounds: int = 9,
    warmup: int = 2,
    seconds: float = float("inf"),
    head_start: bool = True,
) -> dict[str, Times]:
    """Times functions in turn, round after round, so that they see the same machine.

    head_start: without it calls follow one another as a training loop's steps do, and the slower of host and device
    is what shows.
    seconds: no further round is started after these, once there are a few.
    A call that was issued too late for its head start is not counted; the next head start is longer.
    """
    calls: dict[str, list[tuple[bool, object, object, float]]] = {name: [] for name in functions}
    needed = dict.fromkeys(functions, 0.0)
    deadline = device.now() + seconds
    for round_idx in range(-warmup, rounds):
        if round_idx >= _FEWEST_ROUNDS and device.now() > deadline:
            break
        for name, function in functions.items():
            given = min(max(_HEAD_START * needed[name], _LEAST_HEAD_START_MS), _MOST_HEAD_START_MS)
            if head_start:
                device.synchronize()
                device.busy(given)
            start, issued = device.mark(), device.now()
            function()
            host_ms = (device.now() - issued) * 1e3
            end = device.mark()
            # The first call compiles: what it takes is no measure of the others.
            needed[name] = max(needed[name], host_ms) if round_idx > -warmup else 0.0
            if round_idx >= 0:
                late = head_start and host_ms > given and given < _MOST_HEAD_START_MS
                calls[name].append((late, start, end, host_ms))
        if round_idx == -1:
            device.synchronize()
    device.synchronize()
    found = {}
    for name, all_of_it in calls.items():
        in_time = [call for call in all_of_it if not call[0]]
        counted = in_time if len(in_time) >= _FEWEST_ROUNDS else all_of_it
        found[name] = Times([device.between(start, end) for _, start, end, _ in counted], [call[3] for call in counted])
    return found


def on_provider(implementation: str) -> AbstractContextManager:
    """The context in which an implementation's forward and backward run."""
    return provider(implementation) if implementation in PROVIDERS else nullcontext()

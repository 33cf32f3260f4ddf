"""From a Chrome trace with the tracer's marks to seconds and launches of every work.

On a CPU a work takes as long as the ops inside its mark, without the marks' own cost; on a GPU, as long as the kernels
whose launches lie inside its mark.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from mmpeft_fast.profiling.tracer import MARK

_ON_GPU = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_LAUNCHES = frozenset(("cuda_runtime", "cuda_driver"))


class Span(NamedTuple):
    """What a work took; launches: kernels on a GPU, 1 on a CPU."""

    seconds: float
    launches: int


class _Marks:
    """Finds the mark that a moment of a thread lies in."""

    def __init__(self, events: Sequence[dict]):
        self._by_thread: dict[object, list[tuple[float, float, int]]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "user_annotation" and event["name"].startswith(MARK):
                number = int(event["name"].removeprefix(MARK).split(maxsplit=1)[0])
                self._by_thread[event["tid"]].append((event["ts"], event["ts"] + event["dur"], number))
        for marks in self._by_thread.values():
            marks.sort()

    def at(self, event: dict) -> int | None:
        marks = self._by_thread.get(event["tid"], [])
        i = bisect_right(marks, (event["ts"], float("inf"), 0)) - 1
        return marks[i][2] if i >= 0 and event["ts"] <= marks[i][1] else None


def spans(events: Sequence[dict], *, on_gpu: bool) -> tuple[dict[int, Span], dict[str, Span]]:
    """Spans of a trace.

    Args:
        events: `traceEvents` of a Chrome trace that torch's profiler wrote; times in microseconds.
        on_gpu: kernels count, else ops.

    Returns:
        Spans by the work's number, and those of kernels outside all marks by the kernel's name.
    """
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    marks = _Marks(complete)
    return _gpu_spans(complete, marks) if on_gpu else (_cpu_spans(complete, marks), {})


def _cpu_spans(events: Sequence[dict], marks: _Marks) -> dict[int, Span]:
    """The outermost ops inside each mark."""
    seconds: dict[int, float] = defaultdict(float)
    ends: dict[object, float] = defaultdict(lambda: float("-inf"))
    ops = [e for e in events if e.get("cat") == "cpu_op" and not e["name"].startswith("profiler::")]
    for event in sorted(ops, key=lambda event: (event["ts"], -event["dur"])):
        number = marks.at(event)
        if number is None or event["ts"] < ends[event["tid"]]:
            continue
        ends[event["tid"]] = event["ts"] + event["dur"]
        seconds[number] += event["dur"] * 1e-6
    return {number: Span(value, 1) for number, value in seconds.items()}


def _gpu_spans(events: Sequence[dict], marks: _Marks) -> tuple[dict[int, Span], dict[str, Span]]:
    launched = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    inside: dict[int, Span] = defaultdict(lambda: Span(0.0, 0))
    outside: dict[str, Span] = defaultdict(lambda: Span(0.0, 0))
    for event in events:
        if event.get("cat") not in _ON_GPU:
            continue
        launch = launched.get(event.get("args", {}).get("correlation"))
        number = None if launch is None else marks.at(launch)
        found, key = (outside, event["name"]) if number is None else (inside, number)
        seconds, launches = found[key]
        found[key] = Span(seconds + event["dur"] * 1e-6, launches + 1)
    return dict(inside), dict(outside)

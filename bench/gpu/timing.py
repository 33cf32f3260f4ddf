"""Milliseconds of functions that take turns: interleaved, caches flushed, medians; CUDA events on a GPU."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from mmpeft_fast import provider
from mmpeft_fast.ops.providers import PROVIDERS

# Twice the L2 of the largest GPU so far (B200: 126 MB), so that nothing of a call is left for the next one.
_FLUSH_BYTES = 256 << 20
_FEWEST_ROUNDS = 3


def on_provider(implementation: str) -> AbstractContextManager:
    """The context in which an implementation's forward and backward run."""
    return provider(implementation) if implementation in PROVIDERS else nullcontext()


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class _Events:
    """Times on the GPU's own clock. Writing the flush buffer also gives the CPU a head start over the GPU."""

    def __init__(self):
        self._buffer = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, function: Callable[[], object]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._buffer.zero_()
        start.record()
        function()
        end.record()
        return lambda: start.elapsed_time(end)


def _wall(function: Callable[[], object]) -> Callable[[], float]:
    start = time.perf_counter()
    function()
    elapsed_ms = (time.perf_counter() - start) * 1e3
    return lambda: elapsed_ms


def interleaved_ms(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: str,
    rounds: int = 15,
    warmup: int = 2,
    seconds: float = float("inf"),
) -> dict[str, list[float]]:
    """Times functions in turn, round after round, so that they see the same machine; milliseconds by name.

    seconds: no further round is started after these, once there are a few.
    """
    once = _Events() if device == "cuda" else _wall
    times: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.monotonic() + seconds
    for round_idx in range(warmup + rounds):
        if round_idx - warmup >= _FEWEST_ROUNDS and time.monotonic() > deadline:
            break
        pending = {name: once(function) for name, function in functions.items()}
        synchronize(device)
        if round_idx >= warmup:
            for name, elapsed in pending.items():
                times[name].append(elapsed())
    return times


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """What replays `function` as a CUDA graph: the same kernels without their launch costs.

    Raises:
        RuntimeError: the function cannot be captured (it waits for the GPU, say).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def num_launches(function: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that one call runs on the GPU; None where the profiler sees none."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events()) or None

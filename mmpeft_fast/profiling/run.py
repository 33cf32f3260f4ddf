"""Profiling implementations of one step, layer or op side by side: in turn without tracing, then traced."""

import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mmpeft_fast.plan.calibrate import calibrate
from mmpeft_fast.plan.devices import DEVICES, Device, device_named
from mmpeft_fast.plan.request import Request
from mmpeft_fast.profiling.measured import Measured
from mmpeft_fast.profiling.session import activities, chrome_trace, profile, synchronize
from mmpeft_fast.profiling.subjects import WHAT, Subject, config_of, subject

_WARMUP = 2
_TRACED_RUNS = 3
_SNAPSHOT_ENTRIES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What is profiled.

    Attributes:
        request: model, method and batch; its implementation is replaced by each of `implementations`.
        what: one of `subjects.WHAT`. layers: of the decoder, None for all.
        steps: timed runs of each implementation. device: "cpu" or "cuda".
        device_profile: name or file of a profile for the roofline, "measure" or "none"; None: the GPU's own where it
            is known by name, else measured.
    """

    request: Request
    implementations: tuple[str, ...] = ("frozen", "peft", "fused")
    what: str = "step"
    layers: int | None = None
    steps: int = 5
    device: str = "cpu"
    device_profile: str | None = None

    def __post_init__(self):
        if self.what not in WHAT:
            raise ValueError(f"what: expected one of {list(WHAT)}, got {self.what!r}")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")
        if not self.implementations or len(set(self.implementations)) != len(self.implementations):
            raise ValueError(f"implementation: expected one or more, each once, got {list(self.implementations)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device: expected cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: expected a CUDA device for cuda, torch sees none")
        for name in self.implementations:
            self.request_for(name)
        config_of(self.request.model, self.layers)
        if self.device_profile not in (None, "measure", "none"):
            device_named(self.device_profile)

    def request_for(self, implementation: str) -> Request:
        return dataclasses.replace(self.request, implementation=implementation)


def known_gpu(name: str, memory_bytes: int) -> Device | None:
    """The profile of a GPU by the driver's name for it, such as "NVIDIA H100 80GB HBM3"; None where there is none."""
    words = name.lower().replace(" ", "-").split("-")
    if {"pcie", "nvl"} & set(words):  # slower than the cards that the profiles describe
        return None
    known = [
        p for p in DEVICES if p != "cpu" and f"-{p.removesuffix('-40').removesuffix('-80')}-" in f"-{'-'.join(words)}-"
    ]
    # Cards that differ in nothing but their memory share a name.
    return min(map(device_named, known), key=lambda found: abs(found.memory_bytes - memory_bytes), default=None)


def roofline_device(config: ProfileConfig) -> Device | None:
    """The device's profile for the roofline."""
    wanted = config.device_profile
    if wanted == "none":
        return None
    if wanted is None and config.device == "cuda":
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        found = known_gpu(torch.cuda.get_device_name(), memory)
        if found is not None:
            return found
    return calibrate(config.device, config.device) if wanted in (None, "measure") else device_named(wanted)


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, after_round: Callable[[int], None] = lambda i: None
) -> dict[str, list[float]]:
    """Seconds of functions that run in turn, round after round, so that they see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_idx in range(rounds):
        for name, function in functions.items():
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            times[name].append(time.perf_counter() - started)
        after_round(round_idx)
    return times


def run_profile(config: ProfileConfig, say: Callable[[str], None]) -> tuple[list[Measured], Device | None]:
    """Profiles every implementation.

    Args:
        config: what.
        say: gets a line for each stage.

    Returns:
        What was measured, in the order of `config.implementations`, and the profile that the roofline took.

    Raises:
        ValueError: an implementation has no such method or part.
    """
    device = torch.device(config.device)
    subjects: dict[str, Subject] = {}
    for name in config.implementations:
        say(f"building {name}")
        subjects[name] = subject(config.what, config.request_for(name), config_of(config.request.model, config.layers),
                                 device)  # fmt: skip
    say("warming up")
    functions = {name: one.run for name, one in subjects.items()}
    interleaved(functions, rounds=_WARMUP)
    times = interleaved(functions, rounds=config.steps, after_round=lambda i: say(f"round {i + 1} of {config.steps}"))
    if config.device_profile != "none":
        say("roofline of the device")
    roofline = roofline_device(config)
    measured = []
    for name, one in subjects.items():
        say(f"tracing {name}")
        measured.append(_traced(name, one, times[name], roofline))
    return measured, roofline


def _traced(name: str, one: Subject, times_s: Sequence[float], roofline: Device | None) -> Measured:
    profiles = [_profiled(one, roofline) for _ in range(_TRACED_RUNS)]
    seconds = [sum(row.seconds for row in found.rows) for found in profiles]
    middle = profiles[seconds.index(statistics.median_low(seconds))]
    with torch.profiler.profile(activities=activities()) as profiler:
        one.run()
        synchronize()
    return Measured(
        name=name, origin=one.origin, times_s=times_s, rows=middle.rows, timeline=middle.timeline,
        trace=chrome_trace(profiler), memory_snapshot=_snapshot(one),
    )  # fmt: skip


def _profiled(one: Subject, roofline: Device | None) -> profile:
    gc.collect()  # what earlier runs left is not of this one
    found = profile(one.model, device=roofline, region=one.region)
    with found:
        one.run()
    return found


def _snapshot(one: Subject) -> bytes | None:
    """torch.cuda's memory history of a run, for https://pytorch.org/memory_viz."""
    if not next(one.model.parameters()).is_cuda:
        return None
    torch.cuda.memory._record_memory_history(max_entries=_SNAPSHOT_ENTRIES)
    try:
        one.run()
        synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "snapshot.pickle"
            torch.cuda.memory._dump_snapshot(str(path))
            return path.read_bytes()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)

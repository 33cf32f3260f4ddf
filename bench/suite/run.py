"""Runs: cases in the order of what they say, as far as the seconds and the memory go; growth; the sweep."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from bench.rows import append_rows, environment, read_rows
from bench.suite.bootstrap import ratio_of
from bench.suite.cases import Case, features
from bench.suite.implementations import Implementation
from bench.suite.measure import LEFT_OUT, measure
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.plan.calibrate import seconds_of

Emit = Callable[[Sequence[dict]], None]
_FEWEST_CALLS = 8  # of an implementation: judged, warmed up, counted, and a few rounds
_DOUBLE = 4  # what a pass in float64 takes, in passes
_SIDE = {"cpu": 1024, "cuda": 8192}  # of the product that tells a device's rate
_COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}


class Machine:
    """What a device computes and moves a second, and the memory that is free."""

    def __init__(self, device: str, dtypes: Iterable[str]):
        self.device = device
        self.flops_per_s = {dtype: self._product_rate(dtype) for dtype in dtypes}
        source = torch.empty(_COPY_BYTES[device], dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.bytes_per_s = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)

    def _product_rate(self, dtype: str) -> float:
        side = _SIDE[self.device]
        a, b = (torch.randn(side, side, device=self.device).to(DTYPES[dtype]) for _ in range(2))
        return 2 * side**3 / seconds_of(lambda: a @ b, self.device)

    def row(self) -> dict:
        rates = {"flops_per_s": self.flops_per_s, "bytes_per_s": self.bytes_per_s}
        return {"op": "suite", "mode": "machine", **rates, **environment(self.device)}

    def free_bytes(self) -> int:
        if self.device == "cuda":
            return torch.cuda.mem_get_info()[0]
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Budget:
    """Seconds that are left, and what a case may take of them."""

    def __init__(self, seconds: float, machine: Machine):
        self.seconds, self.machine = seconds, machine
        self._deadline = time.monotonic() + seconds
        # A pass takes _overhead + _slowness * what the device's rates say.
        self._overhead, self._slowness = 0.02, 3.0

    @property
    def left(self) -> float:
        return self._deadline - time.monotonic()

    @property
    def share(self) -> float:
        """Seconds of rounds that one case gets at most."""
        return min(max(self.seconds / 12, 0.5), 30.0)

    def expected(self, case: Case, num_implementations: int) -> float:
        """Seconds of a case without what its implementations take to start."""
        passes = num_implementations * _FEWEST_CALLS + _DOUBLE
        return (self._overhead + self._slowness * self._ideal(case)) * passes + 0.5

    def _ideal(self, case: Case) -> float:
        width = DTYPES[case.dtype].itemsize
        weights = 2 * case.parameters * width / self.machine.bytes_per_s
        return case.flops / self.machine.flops_per_s[case.dtype] + weights

    def learn_from(self, case: Case, rows: Sequence[dict]) -> None:
        """What a pass really took."""
        times = [row["p50_ms"] / 1e3 for row in rows if "p50_ms" in row]
        if not times:
            return
        ideal, pass_seconds = self._ideal(case), sum(times) / len(times)
        self._overhead = min(self._overhead, pass_seconds)
        if ideal > self._overhead:
            self._slowness = max(1.0, (pass_seconds - self._overhead) / ideal)

    def why_not(self, case: Case, num_implementations: int) -> str | None:
        expected, left = self.expected(case, num_implementations), max(self.left, 0.0)
        if expected > left:
            return "time"
        return "memory" if self._bytes(case, num_implementations) > 0.8 * self.machine.free_bytes() else None

    def _bytes(self, case: Case, num_implementations: int) -> int:
        """About: a copy of the weights for every implementation, two more and one in float64 for the judge; the
        activations of one pass in float64, the most that a stock stack keeps."""
        width = DTYPES[case.dtype].itemsize
        weights = case.parameters + 2 * case.hidden * case.vocab
        activations = case.tokens * (case.layers * (17 * case.hidden + 6 * case.intermediate) + 3 * case.vocab)
        return weights * (width * (num_implementations + 2) + 8) + 8 * activations

    def slow_to_start(self, implementations: Mapping[str, Implementation]) -> dict[str, str]:
        """Implementations that would take more than a quarter of what is left before they run."""
        left = max(self.left, 0.0)
        return {
            name: f"takes about {one.start_s:.0f} s to start, more than a quarter of what is left"
            for name, one in implementations.items()
            if one.start_s > left / 4
        }


def run_cases(
    cases: Sequence[Case],
    implementations: Mapping[str, Implementation],
    budget: Budget,
    device: str,
    emit: Emit,
    **tags: object,
) -> None:
    """Measures cases in their order and emits the rows of each at once; then one that says what was left out.

    tags: fields of every row.
    """
    left_out: list[tuple[Case, str]] = []
    seen: set[tuple] = set()
    for case in cases:
        taking_part = {name: one for name, one in implementations.items() if one.why_not(case, device) is None}
        why_not = budget.why_not(case, len(taking_part))
        if why_not is not None:
            left_out.append((case, why_not))
            continue
        slow = budget.slow_to_start(taking_part)
        rows = list(measure(case, implementations, device=device, seconds=budget.share, left_out=slow))
        budget.learn_from(case, rows)
        seen |= features(case)
        emit([{**tags, **row} for row in rows])
    if left_out:
        emit([{"op": "suite", "mode": LEFT_OUT, **tags, **_left_out(cases, left_out, seen), **environment(device)}])


def _left_out(cases: Sequence[Case], left_out: Sequence[tuple[Case, str]], seen: set[tuple]) -> dict:
    """How many cases for which reason, and the settings that no measured case has."""
    unseen = sorted({str(one) for case, _ in left_out for one in _singles(features(case) - seen)})
    return {"cases": len(cases), "left_out": dict(Counter(reason for _, reason in left_out)), "unseen": unseen}


def _singles(found: set[tuple]) -> set[str]:
    return {f"{feature[0]} {_plain(feature[1])}" for feature in found if not isinstance(feature[0], tuple)}


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def left_out_text(row: Mapping) -> str:
    reasons = ", ".join(f"{count} for want of {reason}" for reason, count in row["left_out"].items())
    unseen = f"; not seen at all: {', '.join(row['unseen'])}" if row["unseen"] else "; every setting was seen"
    what = f"growth with {row['growth']}: " if "growth" in row else ""
    return f"{what}left out {sum(row['left_out'].values())} of {row['cases']} cases ({reasons}){unseen}"


SWEPT = ("frozen", "peft", "fused")
_SWEEP_SECONDS, _SWEEP_ROUNDS = 4.0, 7


def sweep(
    shapes: Sequence[Case],
    seed: int,
    implementations: Mapping[str, Implementation],
    budget: Budget,
    device: str,
    known: Sequence[dict],
    emit: Emit,
) -> list[dict]:
    """Measures the shapes of a seed that `known` rows do not have yet; the rows of all.

    A shape that does not fit into the time or the memory that is left stays open.
    """
    names = [case.name() for case in shapes]
    rows = [row for row in known if row.get("sweep") == seed and row["case"] in names]
    done = {row["case"] for row in rows}
    for index, case in enumerate(shapes):
        if case.name() in done or budget.why_not(case, len(implementations)) is not None:
            continue
        found = list(
            measure(
                case, implementations, device=device, seconds=_SWEEP_SECONDS, left_out={}, rounds=_SWEEP_ROUNDS,
                with_work=False,
            )
        )  # fmt: skip
        budget.learn_from(case, found)
        found = [{"sweep": seed, "shape": index, **row} for row in found]
        emit(found)
        rows += found
    return rows


def faults(rows: Sequence[dict]) -> list[str]:
    """Shapes of a sweep where `fused` is refused or fails, is slower than `peft` beyond the noise, or keeps more."""
    by_shape: dict[int, dict[str, dict]] = {}
    for row in rows:
        by_shape.setdefault(row["shape"], {})[row["implementation"]] = row
    found = []
    for _, named in sorted(by_shape.items()):
        case = next(iter(named.values()))["case"]
        fused, peft = named.get("fused", {}), named.get("peft", {})
        if fused.get("status") != "ok":
            found.append(f"{case}: fused {fused.get('status')}: {fused.get('reason')}")
            continue
        if "rounds_ms" not in peft:
            continue
        value, (low, _) = ratio_of(fused["rounds_ms"], peft["rounds_ms"])
        if low > 1 + fused["noise"]:
            found.append(f"{case}: {value:.2f} times HF PEFT's time (noise {fused['noise']:.0%})")
        if fused["saved_mib"] > peft["saved_mib"]:
            found.append(f"{case}: keeps {fused['saved_mib']:.3g} MiB, HF PEFT {peft['saved_mib']:.3g}")
    return found


def rows_so_far(path: Path | None) -> list[dict]:
    """What a file has already. Raises ValueError where these are no rows."""
    try:
        return read_rows(path) if path is not None and path.exists() else []
    except ValueError as error:
        raise ValueError(f"--out: expected a file of JSON lines to append to, {path} is none ({error})") from error


def saved_to(path: Path | None, say: Callable[[dict], None]) -> Emit:
    """An `emit` that says rows and appends them to a file."""

    def emit(rows: Sequence[dict]) -> None:
        for row in rows:
            say(row)
        if path is not None:
            append_rows(path, list(rows))

    return emit

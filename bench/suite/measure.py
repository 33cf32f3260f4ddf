"""A case measured: every implementation judged, then timed in rounds that take turns; one row each."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict

import torch

from bench.gpu.timing import Times, device_of, timed
from bench.rows import environment
from bench.suite.bootstrap import ratio_of
from bench.suite.cases import Case, stock
from bench.suite.implementations import Implementation
from bench.suite.peers import PeerTrial
from bench.suite.trials import Judge, Trial, baseline

OK, REFUSED, MISSING, FAILED, LEFT_OUT = "ok", "refused", "missing", "failed", "left out"
YARDSTICKS = ("frozen", "peft")
_AGAIN = "frozen, again"
ROUNDS = 15
_WARM_UP_S = 0.2  # of each implementation


def measure(
    case: Case,
    implementations: Mapping[str, Implementation],
    *,
    device: str,
    seconds: float,
    left_out: Mapping[str, str],
    rounds: int = ROUNDS,
    with_work: bool = True,
) -> Iterator[dict]:
    """Rows of a case.

    Args:
        implementations: `frozen` and `peft` among them.
        seconds: that the rounds take together, once there are a few.
        left_out: implementation -> why it does not take part in this case.
        with_work: also counts FLOPs, bytes and launches.
    """
    with ExitStack() as stack:
        rows = _measured(case, implementations, stack, device, seconds, left_out, rounds, with_work)
    for name, row in rows.items():
        common = {"op": "suite", "mode": "fwd_bwd", **asdict(case), "case": case.name(), "implementation": name}
        yield {**common, **row, **environment()}


def _measured(
    case: Case,
    implementations: Mapping[str, Implementation],
    stack: ExitStack,
    device: str,
    seconds: float,
    left_out: Mapping[str, str],
    rounds: int,
    with_work: bool,
) -> dict[str, dict]:
    """implementation -> what its row says beside the case; `stack` ends the processes of peers."""
    model = baseline(case, device)
    judge = Judge(case, implementations["peft"], model, device)
    rows: dict[str, dict] = {}
    trials: dict[str, Trial | PeerTrial] = {}
    for name, implementation in implementations.items():
        why_not = implementation.why_not(case, device)
        if why_not is not None:
            rows[name] = {"status": MISSING, "reason": why_not}
        elif name in left_out:
            rows[name] = {"status": LEFT_OUT, "reason": left_out[name]}
        else:
            trial, rows[name] = _judged(case, implementation, model, judge, stack, device)
            if trial is not None:
                trials[name] = trial
    del model, judge
    times = _timed(trials, device, seconds, rounds)
    again = times.pop(_AGAIN).device_ms
    noise = max(abs(bound - 1) for bound in ratio_of(again, times["frozen"].device_ms).interval)
    for name, found in times.items():
        row = rows[name]
        row |= {**found.row(), "rounds_ms": found.device_ms, "noise": noise, **trials[name].memory()}
        if with_work and not implementations[name].is_opaque:
            row |= trials[name].work()
        for other in YARDSTICKS:
            if other in times:
                row[f"x_{other}"] = row["p50_ms"] / statistics.median(times[other].device_ms)
    return rows


def _judged(
    case: Case, implementation: Implementation, model: torch.nn.Module, judge: Judge, stack: ExitStack, device: str
) -> tuple[Trial | PeerTrial | None, dict]:
    """The trial, if it may take part, and what its row says of that."""
    started = time.monotonic()
    try:
        if not implementation.trains:  # the yardstick is the stock model itself: nothing to judge
            trial = Trial(case, implementation, stock(case, device).requires_grad_(False), device)
            trial.run()
            return trial, {"status": OK, "start_s": time.monotonic() - started}
        if implementation.peer is None:
            trial = Trial(case, implementation, copy.deepcopy(model), device)
        else:
            trial = stack.enter_context(PeerTrial(case, implementation, model, device))
        found = judge.verdict(trial)
    except (RuntimeError, ImportError) as error:  # other projects' code on this machine
        return None, {"status": FAILED, "reason": " ".join(str(error).split())[:300]}
    row = {"start_s": time.monotonic() - started, **{name: found[name] for name in ("error", "eager_error", "output")}}
    if found["ok"]:
        return trial, {"status": OK, **row}
    return None, {"status": REFUSED, "reason": found["reason"], **row}


def _timed(trials: Mapping[str, Trial | PeerTrial], device: str, seconds: float, rounds: int) -> dict[str, Times]:
    """Rounds that take turns; `frozen` twice, for the machine's own noise."""
    functions: dict[str, Callable[[], object]] = {name: trial.run for name, trial in trials.items()}
    functions[_AGAIN] = trials["frozen"].run
    clock = device_of(device)
    for function in functions.values():
        started = clock.now()
        while clock.now() - started < _WARM_UP_S:
            function()
            clock.synchronize()
    return timed(functions, clock, rounds=rounds, warmup=1, seconds=seconds, head_start=False)

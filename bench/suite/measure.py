"""A case measured: every implementation judged, then timed in rounds that take turns; one row each."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict

from bench.gpu.timing import Times, device_of, timed
from bench.rows import environment
from bench.suite.bootstrap import ratio_of
from bench.suite.cases import Case
from bench.suite.implementations import Implementation
from bench.suite.ops import Ops, OpTrial
from bench.suite.peers import PeerTrial
from bench.suite.trials import Decoders, Judge, Trial

OK, REFUSED, MISSING, FAILED, LEFT_OUT = "ok", "refused", "missing", "failed", "left out"
AnyTrial = Trial | PeerTrial | OpTrial
YARDSTICKS = ("frozen", "peft")
_AGAIN = "frozen, again"
ROUNDS = 15
_MOST_LETTERS = 300  # of a reason
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
        yield {**common, **row, **environment(device)}


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
    try:
        subject = (Ops if case.is_op else Decoders)(case, device)
        judge = Judge(case, subject)
    except RuntimeError as error:  # no memory, as a rule
        reason = f"HF PEFT's truth: {_sentence(error)}"
        return {name: {"status": FAILED, "reason": reason} for name in implementations}
    rows: dict[str, dict] = {}
    trials: dict[str, AnyTrial] = {}
    for name, implementation in implementations.items():
        why_not = implementation.why_not(case, device)
        if why_not is not None:
            rows[name] = {"status": MISSING, "reason": why_not}
        elif name in left_out:
            rows[name] = {"status": LEFT_OUT, "reason": left_out[name]}
        else:
            trial, rows[name] = _judged(implementation, subject, judge, stack)
            if trial is not None:
                trials[name] = trial
    del subject, judge
    if "frozen" not in trials:
        return rows  # nothing to measure the others by
    times = _timed(trials, device, seconds, rounds, from_cold=case.is_op and device == "cuda")
    again = times.pop(_AGAIN).device_ms
    noise = max(abs(bound - 1) for bound in ratio_of(again, times["frozen"].device_ms).interval)
    for name, found in times.items():
        row = rows[name]
        row |= {**found.row(), "rounds_ms": found.device_ms, "noise": noise, **trials[name].memory()}
        if with_work and not implementations[name].is_opaque:
            row |= _work(trials[name])
        for other in YARDSTICKS:
            if other in times:
                row[f"x_{other}"] = row["p50_ms"] / statistics.median(times[other].device_ms)
    return rows


def _work(trial: Trial | OpTrial) -> dict[str, object]:
    try:
        return trial.work()
    except RuntimeError as error:  # torch's profiler records nothing where CUPTI is missing
        return {"work_unknown": _sentence(error)}


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:_MOST_LETTERS]


def _judged(
    implementation: Implementation, subject: Decoders | Ops, judge: Judge, stack: ExitStack
) -> tuple[AnyTrial | None, dict]:
    """The trial, if it may take part, and what its row says of that."""
    started = time.monotonic()
    try:
        trial = subject.trial(implementation, stack)
        if not implementation.trains:  # the yardstick is the stock model itself: nothing to judge
            trial.run()
            return trial, {"status": OK, "start_s": time.monotonic() - started}
        found = judge.verdict(trial)
    except (RuntimeError, ImportError) as error:  # other projects' code on this machine
        return None, {"status": FAILED, "reason": _sentence(error)}
    row = {"start_s": time.monotonic() - started, **{name: found[name] for name in ("error", "eager_error", "output")}}
    if found["ok"]:
        return trial, {"status": OK, **row}
    return None, {"status": REFUSED, "reason": found["reason"], **row}


def _timed(
    trials: Mapping[str, AnyTrial], device: str, seconds: float, rounds: int, *, from_cold: bool
) -> dict[str, Times]:
    """Rounds that take turns; `frozen` twice, for the machine's own noise.

    from_cold: every call starts with empty caches and behind queued work, as an op does in a model.
    """
    functions: dict[str, Callable[[], object]] = {name: trial.run for name, trial in trials.items()}
    functions[_AGAIN] = trials["frozen"].run
    clock = device_of(device)
    for function in functions.values():
        started = clock.now()
        while clock.now() - started < _WARM_UP_S:
            function()
            clock.synchronize()
    return timed(functions, clock, rounds=rounds, warmup=1, seconds=seconds, head_start=from_cold)

"""The program: sections under one budget, each item in a process that has what it needs, into rows and a table.

    rows.jsonl      one measurement a line, the machine first          <gpu>.json      what they prove, for dispatch
    profile.md      where a step's time goes (--profile)               log.txt         what the processes said

All of it is whole on disk whenever the run is cut. Exit code 0; 1 where a check failed or a section broke; 2 without a
GPU or with wrong arguments.
"""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

from bench.gpu import checks, profile, real_peers, tuned, tuning
from bench.gpu.build import Build, is_built
from bench.gpu.machine import why_no_gpu
from bench.gpu.repository import caches
from bench.gpu.shapes import DRY, GPU, Scope
from bench.gpu.worker import one_line
from bench.gpu.workers import run_items
from mmpeft_fast.atomic import write_text

# In the order in which they run, with their shares of the time: what decides the table before what decorates it, bf16
# before all else, whole steps before tiles.
SECTIONS = {
    "machine": 2, "compile": 12, "checks": 16, "steps": 26, "tiles": 22, "ops": 6, "tuned": 5, "others": 8, "graphs": 3,
    "peers": 1,
}  # fmt: skip
_SHARE_WITH_WHEELS = 40
# Kept for ending processes and for the last write.
_RESERVE_SECONDS = 8.0
_SECONDS_BETWEEN_TABLES = 5.0
_CHECK_SECONDS, _STEP_SECONDS = 45.0, 75.0
_MOST_LOG_BYTES = 8 << 20
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
# cuBLAS repeats bit by bit only with a workspace of fixed size.
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
_STOCK = ("frozen", "peft_bf16", "peft")


class Budget:
    """Time: every section has a share of what is left; what it does not use goes to the later ones.

    clock: seconds from any origin, never going back.
    """

    def __init__(self, seconds: float, shares: dict[str, float], clock: Callable[[], float] = time.monotonic):
        self.seconds, self.shares, self._clock = seconds, shares, clock
        self._start = clock()

    @property
    def used(self) -> float:
        return self._clock() - self._start

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.used)

    def allowed(self, section: str) -> float:
        names = list(self.shares)
        after = names[names.index(section) :]
        return self.left * self.shares[section] / sum(self.shares[name] for name in after)


class Program:
    """What the sections share: rows, budget, and how work is given to processes."""

    def __init__(self, out: Path, budget: Budget, scope: Scope, *, profile: bool = False, wheels: Path | None = None):
        self.out, self.budget, self.scope = out, budget, scope
        self.profile, self.wheels = profile, wheels
        self.rows: list[dict] = []
        self.build: Build | None = None
        self.log = out / "log.txt"
        self._file = (out / "rows.jsonl").open("w")
        self._table_at = float("-inf")

    def say(self, line: str) -> None:
        line = f"[{self.budget.used:6.1f} s] {line}"
        print(line, flush=True)
        with self.log.open("a") as log:
            log.write(line + "\n")

    def add(self, section: str, row: dict) -> None:
        row = {"section": section, **row}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self.budget.used - self._table_at > _SECONDS_BETWEEN_TABLES:
            self.write_table()

    @property
    def machine(self) -> dict:
        return next(iter(tuned.of_section(self.rows, "machine")), {})

    def write_table(self) -> None:
        """The table of what is proven so far."""
        self._table_at = self.budget.used
        if self.machine:
            tuned.write_table(self.out, tuned.table(self.rows, f"{self.out.name}/rows.jsonl"))

    def items(self, section: str, work: str, arguments: Iterable[dict], *, seconds: float | None = None, **options):
        """Runs `work` of this package on every arguments; the items that were not finished in time.

        options: "most", the seconds of one item; "fresh", a process for each; and those of `run_items`.
        """
        common = {"work": f"bench.gpu.{work}"}
        common |= {name: options.pop(old) for old, name in (("most", "seconds"), ("fresh", "fresh")) if old in options}
        items = [{**common, "args": each} for each in arguments]

        def on_row(item: dict, row: dict) -> None:
            if isinstance(row.get("error"), str):  # a verdict's error is a number
                named = {name: value for name, value in item["args"].items() if isinstance(value, str | int | float)}
                row = {**named, **row}
                self.say(f"{section}: {named} {row['error']}")
            self.add(section, row)

        interpreted = {"TRITON_INTERPRET": "1"} if self.scope.device == "cpu" else {}
        environment = {**_ENVIRONMENT, **caches(), **interpreted, **options.pop("environment", {})}
        seconds = self.budget.allowed(section) if seconds is None else seconds
        return run_items(items, on_row, seconds=seconds, log=self.log, environment=environment, **options)

    @property
    def cores(self) -> int:
        return max(1, min(16, (os.cpu_count() or 2) - 1))

    @property
    def target(self) -> dict:
        return {"dtype": self.scope.dtype, "device": self.scope.device}

    @cached_property
    def has_cuda(self) -> bool:
        """Whether the extension's CUDA half is there; asked once the build is over."""
        return is_built()

    def close(self) -> None:
        self.write_table()
        self._file.close()
        text = profile.markdown([row for row in self.rows if row.get("mode") == "profile"])
        if text:
            write_text(self.out / "profile.md", text)
        if self.log.stat().st_size > _MOST_LOG_BYTES:
            write_text(self.log, self.log.read_bytes()[-_MOST_LOG_BYTES:].decode("utf-8", "replace"))


def _machine(program: Program) -> str:
    given = [{"device": program.scope.device}]
    program.items("machine", "machine:describe", given, seconds=min(60.0, program.budget.left / 4))
    if program.scope is GPU and not is_built():
        # Half of the cores: compiling and checking beside it is what the table waits for.
        program.build = Build(program.log, jobs=max(1, program.cores // 2))
    return program.machine.get("device", "no GPU")


def _compile(program: Program) -> str:
    """Everything that the steps will run, over all cores: one kernel of one call each, then models of few layers."""
    scope, options = program.scope, {"processes": program.cores, "most": _STEP_SECONDS}
    steps = [
        {"setting": name, "implementation": "triton", "rounds": 1, **program.target}
        for name in (scope.short if scope is GPU else ())
    ]
    calls = [
        {"kernel": kernel, "problem": list(problem), **program.target}
        for kernel, problem in tuning.problems(scope)
        if "gluon" not in kernel and (problem.dims, problem.r, problem.m, problem.p) in scope.problems[:2]
    ]
    left = program.items("compile", "steps:compiled", steps + calls[: scope.few], **options)
    return f"{len(left)} items not finished"


def _ways(program: Program) -> list[str]:
    is_hopper = program.machine.get("capability", [0])[0] == 9
    return ["layout", "triton", *(["gluon"] if is_hopper else [])]


def _checks(program: Program) -> str:
    scope = program.scope
    found = checks.items("triton", scope.dtype, scope.device, _ways(program), scope.few)
    if scope.few:  # whole models take the interpreter minutes
        found = [{**item, "provider": scope.fused} if item["kind"] == "model" else item for item in found]
    options = {"processes": program.cores, "most": _CHECK_SECONDS, "environment": _DETERMINISTIC}
    left = program.items("checks", "checks:run", found, **options)
    program.write_table()
    return f"{len(left)} items not finished; proven: {', '.join(sorted(tuned.proven(program.rows))) or 'nothing'}"


def _steps(program: Program) -> str:
    _end_build(program, program.budget.allowed("steps") / 4)
    scope, rates = program.scope, program.machine
    implementations = ("graphs", scope.fused, *_STOCK)
    whole = [{"setting": name, "implementation": each} for name in scope.whole for each in implementations]
    later = ("default", *(["cuda"] if program.has_cuda else []))
    whole += [{"setting": name, "implementation": each} for each in later for name in scope.whole]
    rates = {name: rates[name] for name in ("copy_gb_s", "gemm_tflops") if name in rates}
    profiled = [
        {"setting": name, "implementation": each, "profile": rates}
        for each in ("graphs", *_STOCK[:2])
        for name in (scope.short if program.profile and rates else ())
    ]
    # The first model tells whether it is right and fast; the profile says why; the rest is for comparison.
    first = len(implementations)
    ordered = whole[:first] + profiled[:1] + whole[first:] + profiled[1:]
    if scope.few:
        ordered = whole[:2] + profiled[:1]
    return _run_steps(program, "steps", ordered)


def _run_steps(program: Program, section: str, items: Sequence[dict], **options) -> str:
    short = {"rounds": 1} if program.scope.few else {}
    arguments = [{**item, **program.target, **short} for item in items]
    left = program.items(
        section, "steps:run_step", arguments, most=_STEP_SECONDS, fresh=not program.scope.few, **options
    )
    for row in tuned.of_section(program.rows, section):
        if "p50_ms" in row:
            program.say(
                f"{row['name']}: {row['implementation']:10} {row['p50_ms']:8.1f} ms, host {row['host_ms']:8.1f} ms, "
                f"{row['tokens_s']:8.0f} tokens/s, peak {row.get('peak_allocated_mib', 0) / 1024:.1f} GiB"
            )
    return f"{len(left)} not run"


def _tiles(program: Program) -> str:
    """Problem by problem: candidates are tried on all cores, then the good ones are timed alone on the machine."""
    groups: dict[tuple, list[tuple[str, tuning.Problem]]] = {}
    gluon = "gemm:gluon" in tuned.proven(program.rows)
    for kernel, problem in tuning.problems(program.scope):
        if gluon or "gluon" not in kernel:
            groups.setdefault((problem.dims, problem.r, problem.m, problem.p), []).append((kernel, problem))
    untimed = 0
    for number, group in enumerate(groups.values()):
        share = program.budget.allowed("tiles") / (len(groups) - number)
        untimed += len(_tune(program, group[: program.scope.few], share))
    return f"{untimed} problems not timed"


def _tune(program: Program, group: Sequence[tuple[str, tuning.Problem]], seconds: float) -> list[dict]:
    started, few = program.budget.used, program.scope.few and 2
    trials = [
        {"kernel": kernel, "problem": list(problem), "tile": tile, **program.target}
        for kernel, problem in group
        for tile in tuning.tiles(kernel, problem)[:few]
    ]
    options = {"processes": program.cores, "most": _CHECK_SECONDS, "environment": {"OMP_NUM_THREADS": "1"}}
    program.items("trials", "tuning:try_tile", trials, seconds=0.55 * seconds, **options)
    good = [row for row in tuned.of_section(program.rows, "trials") if row.get("ok")]
    timed = []
    for kernel, problem in group:
        found = [row["tile"] for row in good if (row["kernel"], row["problem"]) == (kernel, list(problem))]
        if found:
            timed.append({"kernel": kernel, "problem": list(problem), "tiles": found, **program.target})
    left = seconds - (program.budget.used - started)
    return program.items("tiles", "tuning:time_tiles", timed, seconds=left, most=_CHECK_SECONDS)


def _ops(program: Program) -> str:
    providers = ["torch", "triton", *(["cuda"] if program.has_cuda else [])]
    found = [
        {"index": index, "problem": [dims, r, m, p], "providers": providers, **program.target}
        for dims, r, m, p in program.scope.problems[:2]
        for index in range(7)
    ]
    found = found[-2:] if program.scope.few else found
    return f"{len(program.items('ops', 'ops:time_op', found, most=_CHECK_SECONDS))} not run"


def _tuned(program: Program) -> str:
    """Whole steps once more, with the table of this run."""
    program.write_table()
    items = [
        {"setting": name, "implementation": "default", "tables": str(program.out), "label": "table of this run"}
        for name in program.scope.whole
    ]
    return _run_steps(program, "tuned", items)


def _others(program: Program) -> str:
    """Checks that decide less: the extension, other dtypes."""
    scope, few = program.scope, program.scope.few
    found: list[dict] = []
    if few or program.has_cuda:
        found += checks.items("cuda", scope.dtype, scope.device, (), few) + checks.extension_items(scope.device)[:few]
    if scope is GPU:
        for dtype in ("fp16", "fp32"):
            found += checks.items("triton", dtype, scope.device, _ways(program) if dtype == "fp16" else ())
    options = {"processes": program.cores, "most": _CHECK_SECONDS, "environment": _DETERMINISTIC}
    return (
        f"{len(program.items('checks', 'checks:run', found, seconds=program.budget.allowed('others'), **options))} left"
    )


def _graphs(program: Program) -> str:
    # Of text alone: transformers' LLaVA waits for the GPU to count its image tokens, which no graph can hold.
    implementations = (program.scope.fused, *_STOCK)
    items = [
        {"setting": name, "implementation": each, **program.target}
        for name in program.scope.text[:1]
        for each in implementations
    ]
    items = items[: program.scope.few]
    left = program.items("graphs", "steps:run_graph", items, most=_CHECK_SECONDS, fresh=not program.scope.few)
    return f"{len(left)} not run"


def _peers(program: Program) -> str:
    found = real_peers.items(program.wheels, program.scope)
    left = program.items("peers", "real_peers:run", found, most=_STEP_SECONDS, fresh=not program.scope.few)
    return f"{len(left)} not run"


def _end_build(program: Program, seconds: float) -> None:
    if program.build is not None:
        build, program.build = program.build, None
        program.add("build", build.finish(seconds))


_RUN = {
    "machine": _machine, "compile": _compile, "checks": _checks, "steps": _steps, "tiles": _tiles, "ops": _ops,
    "tuned": _tuned, "others": _others, "graphs": _graphs, "peers": _peers,
}  # fmt: skip


def run_sections(program: Program, names: Sequence[str]) -> list[str]:
    """Runs the sections in order; those that broke. An interruption ends them and leaves what is there."""
    broken = []
    for name in names:
        program.say(f"{name}: up to {program.budget.allowed(name):.0f} s")
        started = program.budget.used
        try:
            outcome = _RUN[name](program)
        except KeyboardInterrupt:
            program.say(f"{name}: stopped by a signal")
            break
        except Exception as error:  # the boundary of a section: it is said and the next one runs
            traceback.print_exc()
            outcome = one_line(error)
            broken.append(name)
        program.add("sections", {"name": name, "seconds": program.budget.used - started, "outcome": outcome})
        program.say(f"{name}: {outcome}")
    return broken


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of the rows and the table")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for everything (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--profile", action="store_true", help="also where the time of a step goes, kernel by kernel")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels of real peers (unsloth, liger-kernel, ...)")
    parser.add_argument("--dry", action="store_true", help="everything on the CPU with tiny models, to find mistakes")
    args = parser.parse_args(arguments)
    if not args.seconds > _RESERVE_SECONDS:
        parser.error(f"--seconds: expected more than {_RESERVE_SECONDS:.0f}, got {args.seconds:g}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    reason = None if args.dry else why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    names = [name for name in SECTIONS if name in args.sections or name == "machine"]
    shares = {**SECTIONS, "peers": _SHARE_WITH_WHEELS if args.wheels else SECTIONS["peers"]}
    budget = Budget(args.seconds - _RESERVE_SECONDS, {name: shares[name] for name in names})
    args.out.mkdir(parents=True, exist_ok=True)
    scope = DRY if args.dry else GPU
    program = Program(args.out.resolve(), budget, scope, profile=args.profile, wheels=args.wheels)

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    broken: list[str] = []
    try:
        broken = run_sections(program, names)
    finally:
        signal.signal(signal.SIGTERM, before)
        _end_build(program, 0.0)
        program.close()
    failed = tuned.failed(program.rows)
    for row in failed[:20]:
        why = row.get("reason") or row.get("error")
        print(f"FAILED {row.get('check')} {row.get('dtype')} {row.get('provider')}: {why}")
    program.say(f"wrote {args.out}; {len(failed)} checks failed")
    return 1 if failed or broken else 0

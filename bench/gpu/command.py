"""The program: sections under one budget, each in processes of its own, into gpu.json and tuned/<gpu>.json.

    python -m bench.gpu --out DIR [--seconds 540] [--sections build checks tiles ops layer steps]

Exit code 0; 1 where a correctness check or a whole section failed; 2 without a GPU or with wrong arguments.
"""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.gpu.budget import Budget
from bench.gpu.build import Build
from bench.gpu.machine import clocks, why_no_gpu
from bench.gpu.repository import commit, make_importable
from bench.gpu.results import Results
from bench.gpu.worker import one_line
from bench.gpu.workers import run_items

# Shares of the time, from what a section has to do: compiling is most of checks and tiles.
SECTIONS = {"build": 1, "checks": 26, "tiles": 20, "ops": 13, "layer": 6, "steps": 31}
# Kept for ending processes and for the last write.
_RESERVE_SECONDS = 8.0
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# cuBLAS repeats bit by bit only with a workspace of fixed size.
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
_ONE_MODEL_AFTER_ANOTHER = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
_CHECK_SECONDS, _TRIAL_SECONDS, _STEP_SECONDS = 60.0, 60.0, 110.0
_ROWS_A_LINE = 200
# Of the checks' time, for all providers but the one that the build beside them has to bring first.
_SHARE_BEFORE_CUDA = 0.75


class Program:
    """What the sections share: results, budget, and how work is given to processes."""

    def __init__(self, out: Path, budget: Budget, say: Callable[[str], None] = print, device: str = "cuda"):
        self.out, self.budget, self.device = out, budget, device
        self.results = Results(out / "gpu.json")
        self.unfinished: list[dict] = []
        self.build: Build | None = None
        self._say = say

    def say(self, line: str) -> None:
        self._say(f"[{self.budget.used:6.1f} s] {line}")

    @property
    def machine(self) -> dict:
        return self.results.data.get("machine", {})

    @property
    def processes(self) -> int:
        """As many as compile at once without taking every core."""
        return max(1, min(12, (os.cpu_count() or 2) - 2))

    def items(self, section: str, work: str, items: Sequence[dict], seconds: float, **options) -> list[dict]:
        """Runs items, adding what they say of themselves to rows of a failure; the items that were not started."""
        environment = {**_ENVIRONMENT, **options.pop("environment", {})}

        def on_row(item: dict, row: dict) -> None:
            named = {name: value for name, value in item.items() if isinstance(value, str | int | float)}
            self.results.add(section, {**named, **row} if "error" in row and "ok" not in row else row)
            if len(self.results.rows(section)) % _ROWS_A_LINE == 0:
                self.say(f"{section}: {len(self.results.rows(section))} rows")
            if "error" in row and isinstance(row["error"], str):
                self.say(f"{section}: {named} failed: {row['error']}")

        log = self.out / "logs" / f"{section}.log"
        return run_items(work, items, on_row, seconds=seconds, log=log, environment=environment, **options)


def _providers(names: Sequence[str] = ("torch", "triton", "cuda")) -> list[str]:
    """Those of the names that are installed. Asking for cuda loads the extension, which has to be built by then."""
    from mmpeft_fast.ops.providers import why_not_installed

    return [name for name in names if why_not_installed(name) is None]


def _describe(program: Program) -> None:
    """The machine, from a process that starts CUDA in this one's place."""
    found: list[dict] = []
    run_items(
        "bench.gpu.machine:describe", [{}], lambda item, row: found.append(row), seconds=min(60.0, program.budget.left),
        log=program.out / "logs" / "machine.log",
    )  # fmt: skip
    program.results.data["machine"] = {**(found[-1] if found else {}), "clocks": []}


def _build(program: Program) -> str:
    """Starts the build; the checks, which leave cores free and measure no time, run beside it."""
    program.build = Build(program.out / "logs" / "build.log")
    if "checks" in program.budget.shares:
        return "started"
    return _end_build(program, program.budget.allowed("build"))


def _end_build(program: Program, seconds: float) -> str:
    """The outcome of a build that was started."""
    if program.build is None:
        return "no build"
    row, program.build = program.build.finish(seconds), None
    program.results.add("build", row)
    return "extension built" if row["ok"] else f"no extension: {row['reason']}"


def _checks(program: Program) -> str:
    from bench.gpu import checks, tuned

    is_hopper = program.machine.get("capability", [0])[0] == 9
    ways = ["layout", "triton", *(["gluon"] if is_hopper else [])]
    options = {
        "num_processes": program.processes, "item_seconds": _CHECK_SECONDS,
        "environment": {**_DETERMINISTIC, "OMP_NUM_THREADS": "1"},
    }  # fmt: skip
    seconds = program.budget.allowed("checks")
    items = checks.test_files() + checks.items(_providers(("torch", "triton")), ways, program.device)
    left = program.items("checks", "bench.gpu.checks:run", items, _SHARE_BEFORE_CUDA * seconds, **options)
    program.say(_end_build(program, program.budget.allowed("checks") / 2))
    cuda = _providers(("cuda",))
    items = checks.items(cuda, [], program.device) + (checks.extension_tests() if cuda else [])
    left += program.items("checks", "bench.gpu.checks:run", items, program.budget.allowed("checks"), **options)
    program.unfinished = left
    rows = program.results.rows("checks")
    failed = tuned.failed(_flat(program))
    for row in failed[:20]:
        what = row.get("check") or f"{row.get('kind')}: {row.get('name')}"
        program.say(f"FAILED {what} {row.get('dtype')} {row.get('provider')}: {row.get('reason') or row.get('error')}")
    program.results.section("checks")["not_run"] = [f"{item['kind']}: {item['name']}" for item in program.unfinished]
    return f"{len(rows) - len(failed)} passed, {len(failed)} failed, {len(program.unfinished)} items not run"


def _tiles(program: Program) -> str:
    from bench.gpu import tuned, tuning
    from bench.gpu.tunables import TUNABLES, Problem

    has_gluon = "gemm:gluon" in tuned.proven(_flat(program))
    kernels = [name for name in TUNABLES if has_gluon or "gluon" not in name]
    seconds = program.budget.allowed("tiles")
    common = {"dtype": "bf16", "device": program.device}
    trials = [{**trial, **common} for trial in _alternating([tuning.trials(name) for name in kernels])]
    not_tried = program.items(
        "tiles", "bench.gpu.tuning:try_tile", trials, 0.55 * seconds, num_processes=program.processes,
        item_seconds=_TRIAL_SECONDS, environment={"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    rows = list(program.results.rows("tiles"))
    tried = [row for row in rows if "key" in row]
    timed = []
    for kernel, problem in _alternating([[(name, each) for each in tuning.problems(name)] for name in kernels]):
        tiles = tuning.good_tiles(tried, kernel, Problem(*problem))
        if tiles:
            timed.append({"kernel": kernel, "problem": list(problem), "tiles": tiles, **common})
    not_timed = program.items(
        "tiles", "bench.gpu.tuning:time_tiles", timed, program.budget.allowed("tiles"), item_seconds=_TRIAL_SECONDS
    )
    _write_table(program)
    good = sum(row["ok"] for row in tried)
    return f"{good} of {len(tried)} tiles good, {len(not_tried)} not tried; {len(not_timed)} problems not timed"


def _alternating(lists: Sequence[Sequence]) -> list:
    """One of each list in turn, so that where time runs out every kernel has had some."""
    longest = max(map(len, lists), default=0)
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def _flat(program: Program) -> list[dict]:
    """Every row with its section, as `tuned` reads them."""
    machine = {"section": "machine", "device": program.machine.get("device", "unknown")}
    sections = program.results.data["sections"].items()
    return [machine, *({"section": name, **row} for name, section in sections for row in section["rows"])]


def _write_table(program: Program) -> None:
    """The table of what has been measured so far; nothing is proven before its rows are there."""
    from bench.gpu import tuned

    rows = _flat(program)
    path = tuned.write_table(program.out / "tuned", tuned.table(rows, f"{program.out.name}/gpu.json"))
    program.results.data["table"] = {
        "path": path.relative_to(program.out).as_posix(), "proven": sorted(tuned.proven(rows))
    }  # fmt: skip


def _tuned_folder(program: Program) -> str | None:
    folder = program.out / "tuned"
    return str(folder) if folder.exists() else None


def _ops(program: Program) -> str:
    from bench.gpu import op_times

    items = op_times.items(_providers(), program.device, _tuned_folder(program))
    left = program.items("ops", "bench.gpu.op_times:run", items, program.budget.allowed("ops"))
    _write_table(program)
    return f"{len(program.results.rows('ops'))} rows, {len(left)} cases not run"


def _implementations() -> list[str]:
    from bench.gpu.models import STOCK

    return [*STOCK, *_providers(), "default"]


def _layer(program: Program) -> str:
    from bench.gpu import step_times

    items = step_times.layer_items(_implementations(), program.device, _tuned_folder(program))
    left = program.items("layer", "bench.gpu.step_times:run_layer", items, program.budget.allowed("layer"))
    return f"{len(program.results.rows('layer'))} rows, {len(left)} settings not run"


def _steps(program: Program) -> str:
    from bench.gpu import step_times

    items = step_times.step_items(_implementations(), program.device, _tuned_folder(program))
    left = program.items(
        "steps", "bench.gpu.step_times:run_step", items, program.budget.allowed("steps"), item_seconds=_STEP_SECONDS,
        environment=_ONE_MODEL_AFTER_ANOTHER,
    )  # fmt: skip
    section = program.results.section("steps")
    section["rows"] = step_times.with_ratios(section["rows"])
    section["not_run"] = [f"{item['setting']}: {item['implementation']}" for item in left]
    for row in section["rows"]:
        if "p50_ms" in row:
            ratio = f"{row['x_frozen']:.2f} x frozen" if "x_frozen" in row else ""
            program.say(
                f"{row['name']}: {row['implementation']:16} {row['p50_ms']:8.1f} ms {ratio} "
                f"{row['tokens_s']:8.0f} tokens/s, peak {row.get('peak_allocated_mib', 0) / 1024:.1f} GiB"
            )
    return f"{len(section['rows'])} rows, {len(left)} not run"


_RUN = {"build": _build, "checks": _checks, "tiles": _tiles, "ops": _ops, "layer": _layer, "steps": _steps}


def run_sections(program: Program, names: Sequence[str]) -> None:
    """Runs the sections in order; an interruption ends them and leaves what is there."""
    clocks_seen = program.machine.setdefault("clocks", [])
    for name in names:
        started = program.budget.used
        clocks_seen.append({"at_s": started, "before": name, **clocks()})
        section = program.results.section(name)
        program.say(f"{name}: up to {program.budget.allowed(name):.0f} s")
        try:
            outcome, state = _RUN[name](program), "done"
        except KeyboardInterrupt:
            outcome, state = "stopped by a signal", "stopped"
        except Exception as error:  # the boundary of a section: it is said and the next one runs
            traceback.print_exc()
            outcome, state = one_line(error), "failed"
        section |= {"state": state, "outcome": outcome, "seconds": program.budget.used - started}
        program.results.write()
        program.say(f"{name}: {outcome}")
        if state == "stopped":
            break
    clocks_seen.append({"at_s": program.budget.used, "before": None, **clocks()})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder of gpu.json and tuned/")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for everything (default: %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--commit", help="the commit that runs, where there is no git to ask")
    args = parser.parse_args(arguments)
    if not args.seconds > _RESERVE_SECONDS:
        parser.error(f"--seconds: expected more than {_RESERVE_SECONDS:.0f}, got {args.seconds:g}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    make_importable()
    reason = why_no_gpu()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    from bench.gpu import tuned

    names = [name for name in SECTIONS if name in args.sections]
    budget = Budget(args.seconds - _RESERVE_SECONDS, {name: SECTIONS[name] for name in names})
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    program = Program(args.out.resolve(), budget, say=lambda line: print(line, flush=True))
    program.results.data |= {"arguments": {**vars(args), "out": str(args.out)}, **commit()}
    if args.commit:
        program.results.data["commit"] = args.commit

    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        _describe(program)
        run_sections(program, names)
    except KeyboardInterrupt:
        program.say("stopped by a signal")
    finally:
        signal.signal(signal.SIGTERM, before)
        _end_build(program, 0.0)
        failed = tuned.failed(_flat(program))
        program.results.data |= {"seconds": budget.used, "checks_failed": len(failed)}
        program.results.write()
    program.say(f"wrote {args.out / 'gpu.json'}; {len(failed)} checks failed")
    broken = [name for name, section in program.results.data["sections"].items() if section["state"] == "failed"]
    return 1 if failed or broken else 0

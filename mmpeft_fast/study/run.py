"""Runs the study: makes the bases, runs every cell that has no row yet, and keeps one row a cell in results.jsonl."""

import json
import shlex
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path

from mmpeft_fast.atomic import write_text
from mmpeft_fast.doctor import device_name, versions
from mmpeft_fast.json_text import parse
from mmpeft_fast.study.cells import (
    MAJORITY,
    NO_METHOD,
    TINY_MODELS,
    BaseSpec,
    CellSpec,
    StudyConfig,
    cell_name,
    plan,
)
from mmpeft_fast.study.inputs import Inputs, majority_accuracy, prepare_inputs
from mmpeft_fast.study.process import run_job
from mmpeft_fast.study.progress import Progress

RESULTS_NAME, PLAN_NAME = "results.jsonl", "plan.json"
# What a cell measures; a failed cell's row holds None for each.
MEASURED = (
    "baseline",
    "trainable_params",
    "total_params",
    "tokens_per_step",
    "padded_tokens_per_step",
    "supervised_tokens_per_step",
    "step_ms_p50",
    "frozen_step_ms_p50",
    "tokens_per_s",
    "peak_mib",
    "saved_mib",
    "loss_first",
    "loss_last",
    "losses",
    "accuracy",
)


def run_study(config: StudyConfig) -> list[dict]:
    """Runs every cell of the plan that has no successful row yet, one after another, each in a fresh process.

    Args:
        config: what to run, and the folder for results.jsonl, logs and base models.

    Returns:
        the rows of the plan, in its order, as results.jsonl holds them; a failed cell has `status` and `reason`.

    Raises:
        ValueError: the user's conversations, checkpoint or an existing results.jsonl cannot be read; nothing has run.
        KeyboardInterrupt: after Ctrl-C; what is done is kept, and its message says how to go on.
    """
    results_path = config.output / RESULTS_NAME
    rows = {row["spec_key"]: row for row in read_rows(results_path)}
    inputs = prepare_inputs(data=config.data, images=config.images, eval_samples=config.eval_samples)
    bases, cells = plan(config)
    pending = [cell for cell in cells if config.redo or rows.get(cell.key, {}).get("status") != "ok"]
    wanted = {cell.base for cell in pending}
    missing = [base for base in bases if base.key in wanted and not base_folder(config, base).exists()]
    (config.output / "logs").mkdir(parents=True, exist_ok=True)
    store_plan(config.output, {cell.key: cell.name for cell in cells})

    # Cells that are not timed share a process, which comes last.
    together = [cell for cell in pending if not cell.timed]
    pending = [cell for cell in pending if cell.timed] + together
    kinds = ["untimed cell" if cell in together else "cell" for cell in pending]
    progress = Progress(["base"] * len(missing) + kinds)
    num_done = 0

    def keep(cell: CellSpec, outcome: dict, elapsed_s: float) -> None:
        nonlocal num_done
        row = _row(config, cell, outcome, elapsed_s=elapsed_s)
        if row["status"] == "failed":
            progress.say(f"failed: {cell.name}: {row['reason']}")
        store_row(results_path, row)
        num_done += 1

    try:
        broken = {base.key: reason for base in missing if (reason := make_base(config, base, inputs, progress))}
        folders = {base.key: str(base_folder(config, base)) for base in bases}
        for cell in pending[: len(pending) - len(together)]:
            _run_cell(cell, inputs, folders.get(cell.base, cell.base), broken, config, progress, keep)
        _run_together(together, inputs, folders, broken, config, progress, keep)
    except KeyboardInterrupt:
        message = f"{num_done} of {len(pending)} cells are done; the same command goes on from here"
        raise KeyboardInterrupt(message) from None
    finally:
        progress.clear()
    rows = {row["spec_key"]: row for row in read_rows(results_path)}
    return [rows[cell.key] for cell in cells]


def read_rows(path: Path) -> list[dict]:
    """The rows of a results file; none if there is no such file. Raises ValueError for a line that is not a row."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        row = parse(line, f"{path} line {number}")
        if not isinstance(row, dict) or not {"spec_key", "status", "model", "method", "implementation"} <= row.keys():
            raise ValueError(f"{path} line {number}: expected a row of the study, got {line[:40]!r}")
        rows.append(row)
    return rows


def newest_rows(rows: list[dict]) -> list[dict]:
    """The newest row of each cell by name, in the study's order: model by model, frozen first, then by method."""
    newest = {cell_name(row): row for row in sorted(rows, key=lambda r: r["time"])}
    order = {name: index for index, name in enumerate(_usual_order())}

    def place(row: dict) -> tuple[str, int]:
        return row["model"], order.get(cell_name({**row, "model": next(iter(TINY_MODELS))}), len(order))

    return sorted(newest.values(), key=place)


def _usual_order() -> list[str]:
    return [cell.name for cell in plan(StudyConfig(output=Path(), models=(next(iter(TINY_MODELS)),)))[1]]


def store_plan(folder: Path, cells: dict[str, str]) -> None:
    """Writes down which cells a run has, by key and name, so that `study status` knows what is still to come."""
    write_text(folder / PLAN_NAME, json.dumps(cells, indent=1))


def store_row(path: Path, row: dict) -> None:
    """Puts a row into the file in place of an older one of the same cell; the file is seen whole or not at all."""
    rows = [old for old in read_rows(path) if old["spec_key"] != row["spec_key"]] + [row]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def base_folder(config: StudyConfig, base: BaseSpec) -> Path:
    return config.output / "bases" / f"{base.model}-{base.key}"


def make_base(config: StudyConfig, base: BaseSpec, inputs: Inputs, progress: Progress) -> str | None:
    """Makes one base; returns the reason if that failed."""
    folder = base_folder(config, base)
    folder.parent.mkdir(exist_ok=True)
    job = {
        "spec": asdict(base),
        "inputs": asdict(inputs),
        "eval_samples": config.eval_samples,
        "threads": config.threads,
        "folder": str(folder),
    }
    progress.start(f"{base.model} base model")
    outcome = run_job(
        "mmpeft_fast.study.base",
        job,
        log_path=config.output / "logs" / f"{folder.name}.log",
        threads=config.threads,
        offline=True,
        tick=progress.tick,
    )
    progress.finish()
    return outcome.get("reason")


def _run_cell(
    cell: CellSpec,
    inputs: Inputs,
    base: str,
    broken: dict[str, str],
    config: StudyConfig,
    progress: Progress,
    keep: Callable[[CellSpec, dict, float], None],
) -> None:
    """Runs one cell in a process of its own."""
    started = time.monotonic()
    progress.start(cell.name)
    if cell.base in broken:
        outcome = {"status": "failed", "reason": f"no base model: {broken[cell.base]}"}
    else:
        outcome = run_job(
            "mmpeft_fast.study.cell",
            {"spec": asdict(cell), "inputs": asdict(inputs), "base": base},
            log_path=config.output / "logs" / f"{cell.name.replace('/', '_').replace(' ', '-')}-{cell.key}.log",
            threads=cell.threads,
            offline=cell.model in TINY_MODELS,
            tick=progress.tick,
        )
    progress.finish()
    keep(cell, outcome, time.monotonic() - started)


def _run_together(
    cells: list[CellSpec],
    inputs: Inputs,
    bases: dict[str, str],
    broken: dict[str, str],
    config: StudyConfig,
    progress: Progress,
    keep: Callable[[CellSpec, dict, float], None],
) -> None:
    """Runs cells of one tiny base in one process; a cell is kept as soon as it has ended."""
    guessed = [cell for cell in cells if cell.implementation == MAJORITY]
    for cell in guessed:
        progress.start(cell.name)
        accuracy = majority_accuracy(inputs, cell.task, eval_samples=cell.eval_samples)
        progress.finish()
        keep(cell, {"status": "ok", "accuracy": accuracy}, 0.0)
    cells = [cell for cell in cells if cell not in guessed]
    if not cells:
        return
    if cells[0].base in broken:
        for cell in cells:
            progress.start(cell.name)
            progress.finish()
            keep(cell, {"status": "failed", "reason": f"no base model: {broken[cell.base]}"}, 0.0)
        return
    with tempfile.TemporaryDirectory() as folder:
        left = dict(enumerate(cells))

        def take() -> None:
            """Keeps what has ended since the last look; cells end in their order."""
            while left and (path := Path(folder) / f"{min(left)}.json").exists():
                outcome = json.loads(path.read_text(encoding="utf-8"))
                progress.finish()
                keep(left.pop(min(left)), outcome, outcome.pop("elapsed_s"))
                if left:
                    progress.start(left[min(left)].name)
            progress.tick()

        progress.start(cells[0].name)
        job = {"specs": [asdict(cell) for cell in cells], "inputs": asdict(inputs), "folder": folder}
        outcome = run_job(
            "mmpeft_fast.study.cell",
            {**job, "base": bases[cells[0].base]},
            log_path=config.output / "logs" / f"untimed-{cells[0].base}.log",
            threads=config.threads,
            offline=True,
            tick=take,
        )
        take()
        for cell in list(left.values()):  # the process has died
            progress.finish()
            keep(cell, outcome, 0.0)
            progress.start(cell.name)


def _row(config: StudyConfig, cell: CellSpec, outcome: dict, *, elapsed_s: float) -> dict:
    """A cell's record: what it was, what came out, and how to get it again."""
    row = {"spec_key": cell.key, "status": outcome["status"], "reason": outcome.get("reason"), **asdict(cell)}
    row |= dict.fromkeys(MEASURED) | {name: outcome[name] for name in MEASURED if name in outcome}
    if row["step_ms_p50"]:
        row["tokens_per_s"] = row["tokens_per_step"] / row["step_ms_p50"] * 1e3
    if row["losses"]:
        row["loss_first"], row["loss_last"] = row["losses"][0], row["losses"][-1]
    return row | {
        "device_name": device_name(cell.device),
        "versions": versions(),
        "elapsed_s": round(elapsed_s, 1),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(config, cell),
    }


def command_line(config: StudyConfig, cell: CellSpec) -> str:
    """The command that measures one cell again, with every option that is not at its default."""
    words = ["mmpeft-fast", "study", "--redo", "--axes", cell.axis or "none", "--implementations"]
    words.append("frozen" if cell.implementation == MAJORITY else cell.implementation)
    if config.base is None:
        words += ["--models", cell.model]
    if cell.method != NO_METHOD:
        words += ["--methods", cell.method]
    for option in fields(StudyConfig):
        value = getattr(config, option.name)
        # Threads and device default to what the machine has, so they are always told.
        told = option.name in ("output", "threads", "device") or value != option.default
        if told and option.name not in ("models", "methods", "implementations", "axes", "redo"):
            words += [f"--{option.name.replace('_', '-')}", str(value)]
    return shlex.join(words)

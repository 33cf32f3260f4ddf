"""Runs the study: makes the bases, runs every cell that has no row yet, and keeps one row a cell."""

import json
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from mmpeft_fast.doctor import device_name, versions
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
from mmpeft_fast.study.in_turn import InTurn, Runner
from mmpeft_fast.study.inputs import Inputs, majority_accuracy, prepare_inputs
from mmpeft_fast.study.ledger import Ledger
from mmpeft_fast.study.process import Job, run_job
from mmpeft_fast.study.progress import Progress
from mmpeft_fast.study.rows import SUCCESS, file_name, read_rows, store_plan

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


def run_study(config: StudyConfig, runner: Runner | None = None) -> list[dict]:
    """Runs every cell of the plan that has no successful row yet, each in fresh processes.

    Args:
        config: what to run, and the folder for rows, logs and base models.
        runner: where and in which order; None: one after another here.

    Returns:
        the rows of the plan, in its order; one that has not succeeded has `status` and `reason`.

    Raises:
        ValueError: the user's conversations or checkpoint cannot be read; nothing has run.
        KeyboardInterrupt: after Ctrl-C; what is done is kept, and its message says how to go on.
    """
    runner = InTurn() if runner is None else runner
    rows = {row["spec_key"]: row for row in read_rows(config.output)}
    inputs = prepare_inputs(data=config.data, images=config.images, eval_samples=config.eval_samples)
    bases, cells = plan(config)
    pending = [cell for cell in cells if config.redo or rows.get(cell.key, {}).get("status") != SUCCESS]
    wanted = {cell.base for cell in pending}
    missing = [base for base in bases if base.key in wanted and not base_folder(config, base).exists()]
    (config.output / "logs").mkdir(parents=True, exist_ok=True)
    store_plan(config.output, {cell.key: cell.name for cell in cells})

    alone = [cell for cell in pending if cell.timed or not runner.shares_processes]
    together = [cell for cell in pending if cell not in alone]
    guessed = [cell for cell in pending if cell.implementation == MAJORITY]  # no model's work
    kinds = ["untimed cell" if not cell.timed else "cell" for cell in alone + together if cell not in guessed]
    progress = Progress(["base"] * len(missing) + kinds)
    ledger = Ledger(config.output, pending, progress, partial(_row, config))
    with ledger.interruptible():
        for cell in guessed:
            ledger.keep(cell, {"status": SUCCESS, "accuracy": _guessed(cell, inputs)})
        broken = {base.key: reason for base in missing if (reason := make_base(config, base, inputs, progress))}
        for cell in [cell for cell in ledger.left.values() if cell.base in broken]:
            ledger.fail(cell, f"no base model: {broken[cell.base]}")
        folders = {base.key: str(base_folder(config, base)) for base in bases}
        alone, together = ([cell for cell in each if cell.key in ledger.left] for each in (alone, together))
        jobs = [(cell, _job(config, cell, inputs, folders.get(cell.base, cell.base))) for cell in alone]
        ledger.run(runner, jobs)
        _run_together(together, inputs, folders, config, progress, ledger.keep)
    rows = {row["spec_key"]: row for row in read_rows(config.output)}
    return [rows[cell.key] for cell in cells]


def newest_rows(rows: list[dict]) -> list[dict]:
    """The newest row of each cell by name, in the study's order: model by model, frozen first, then by method."""
    newest = {cell_name(row): row for row in sorted(rows, key=lambda r: r["time"])}
    order = {name: index for index, name in enumerate(_usual_order())}

    def place(row: dict) -> tuple[str, int]:
        return row["model"], order.get(cell_name({**row, "model": next(iter(TINY_MODELS))}), len(order))

    return sorted(newest.values(), key=place)


def _usual_order() -> list[str]:
    return [cell.name for cell in plan(StudyConfig(output=Path(), models=(next(iter(TINY_MODELS)),)))[1]]


def base_folder(config: StudyConfig, base: BaseSpec) -> Path:
    return config.output / "bases" / f"{base.model}-{base.key}"


def make_base(config: StudyConfig, base: BaseSpec, inputs: Inputs, progress: Progress) -> str | None:
    """Makes one base; returns the reason if that failed."""
    folder = base_folder(config, base)
    folder.parent.mkdir(exist_ok=True)
    spec = {
        "spec": asdict(base),
        "inputs": asdict(inputs),
        "eval_samples": config.eval_samples,
        "threads": config.threads,
        "folder": str(folder),
    }
    log = config.output / "logs" / f"{folder.name}.log"
    progress.start(f"{base.model} base model")
    outcome = run_job(Job(module="mmpeft_fast.study.base", spec=spec, log=log, threads=config.threads), progress.tick)
    progress.finish()
    return outcome.get("reason")


def _guessed(cell: CellSpec, inputs: Inputs) -> float:
    return majority_accuracy(inputs, cell.task, eval_samples=cell.eval_samples)


def _job(config: StudyConfig, cell: CellSpec, inputs: Inputs, base: str) -> Job:
    return Job(
        module="mmpeft_fast.study.cell",
        spec={"spec": asdict(cell), "inputs": asdict(inputs), "base": base},
        log=config.output / "logs" / f"{file_name(cell.name)}-{cell.key}.log",
        threads=cell.threads,
        offline=cell.model in TINY_MODELS,
    )


def _run_together(
    cells: list[CellSpec],
    inputs: Inputs,
    bases: dict[str, str],
    config: StudyConfig,
    progress: Progress,
    keep: Callable[[CellSpec, dict, float], None],
) -> None:
    """Runs cells of one tiny base in one process; a cell is kept as soon as it has ended."""
    if not cells:
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
        spec = {"specs": [asdict(cell) for cell in cells], "inputs": asdict(inputs), "folder": folder}
        job = Job(
            module="mmpeft_fast.study.cell",
            spec={**spec, "base": bases[cells[0].base]},
            log=config.output / "logs" / f"untimed-{cells[0].base}.log",
            threads=config.threads,
        )
        outcome = run_job(job, take)
        take()
        for cell in list(left.values()):  # the process has died
            progress.finish()
            keep(cell, outcome, 0.0)
            progress.start(cell.name)


def _row(config: StudyConfig, cell: CellSpec, outcome: dict, elapsed_s: float) -> dict:
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
    words = [
        "mmpeft-fast",
        "study",
        "--redo",
        "--axes",
        f"{cell.axis}={cell.value}" if cell.axis else "none",
        "--implementations",
    ]
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

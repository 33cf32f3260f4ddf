"""Runs a recipe: makes the small bases, runs every cell that has no row yet, and keeps one row a cell."""

import shutil
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from mmpeft_fast.data.sets import SETS
from mmpeft_fast.doctor import device_name, versions
from mmpeft_fast.study.cells import EASY_VQA, NO_METHOD, BaseSpec, StudyConfig
from mmpeft_fast.study.in_turn import InTurn, Runner
from mmpeft_fast.study.inputs import prepare_inputs
from mmpeft_fast.study.ledger import Ledger
from mmpeft_fast.study.process import Job
from mmpeft_fast.study.progress import Progress
from mmpeft_fast.study.recipes.recipe import Recipe, RecipeCell
from mmpeft_fast.study.rows import SUCCESS, file_name, read_rows, store_plan
from mmpeft_fast.study.run import base_folder, make_base
from mmpeft_fast.train import TrainConfig

_TINY = "tiny-"


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """A recipe, where its rows go (output), and what it runs with.

    shared: the folder of the small bases, which recipes and the study share. checkpoints: a folder with a folder for
    each model, by its name. datasets: the folder of all data sets. Neither is needed for models that are built on the
    spot. processes: of a cell, data parallel; shard: over which the model's parameters are spread (FSDP2).
    halve_on_oom: where memory runs out the cell runs again with half of its micro-batch, at the same batch a step.
    """

    recipe: Recipe
    output: Path
    shared: Path
    checkpoints: Path | None
    datasets: Path | None
    threads: int
    device: str
    pretrain_steps: int = StudyConfig.pretrain_steps
    redo: bool = False
    refuse_bad_records: bool = False
    processes: int = 1
    shard: bool = False
    halve_on_oom: bool = False

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes: expected at least 1, got {self.processes}")
        if self.shard and self.processes == 1:
            raise ValueError("shard: expected several processes to spread the model over, got 1")

    def work_folder(self, cell: RecipeCell) -> Path:
        """Checkpoints and scores of a cell that has not ended."""
        return self.output / "work" / cell.key

    def forget_work(self, cell: RecipeCell) -> None:
        """Removes a cell's work folder."""
        shutil.rmtree(self.work_folder(cell), ignore_errors=True)

    def check(self) -> None:
        """Raises ValueError that names every checkpoint and every split of a data set that is missing."""
        checkpoints, splits = self._missing_checkpoints(), self._missing_splits()
        missing = []
        if checkpoints:
            where = "--checkpoints DIR" if self.checkpoints is None else self.checkpoints
            missing.append(f"the checkpoint folders {', '.join(checkpoints)} in {where}")
        if splits:
            where = "--datasets DIR" if self.datasets is None else self.datasets
            sets = ", ".join(f"{name} ({', '.join(each)})" for name, each in splits.items())
            missing.append(f"the data sets {sets} in {where}, of which `study data check` names files and publishers")
        if missing:
            raise ValueError(f"recipe {self.recipe.name}: expected {' and '.join(missing)}; or --small")

    def _missing_checkpoints(self) -> list[str]:
        models = dict.fromkeys(cell.model for cell in self.recipe.cells if not cell.model.startswith(_TINY))
        return [name for name in models if self.checkpoints is None or not (self.checkpoints / name).is_dir()]

    def _missing_splits(self) -> dict[str, list[str]]:
        """The splits that are missing or incomplete, by data set."""
        missing: dict[str, list[str]] = {}
        for name, split in dict.fromkeys(
            (data.name, data.split) for cell in self.recipe.cells for data in cell.used_data
        ):
            if name in SETS and (self.datasets is None or SETS[name].missing(self.datasets, split)):
                missing.setdefault(name, []).append(split)
        return missing


def run_recipe(run: RecipeRun, runner: Runner | None = None) -> list[dict]:
    """Runs the cells that have no successful row yet, each in fresh processes; returns the recipe's rows in its order.

    A cell that was stopped or killed goes on from its last checkpoint. runner: where and in which order the cells run;
    None: one after another here.

    Raises:
        ValueError: a checkpoint or data set is missing; nothing has run.
        KeyboardInterrupt: after Ctrl-C; what is done is kept, and its message says how to go on.
    """
    run.check()
    runner = InTurn() if runner is None else runner
    rows = {row["spec_key"]: row for row in read_rows(run.output)}
    pending = [cell for cell in run.recipe.cells if run.redo or rows.get(cell.key, {}).get("status") != SUCCESS]
    config = StudyConfig(output=run.shared, threads=run.threads, pretrain_steps=run.pretrain_steps)
    bases = {
        model: _base(run, model) for model in dict.fromkeys(cell.model for cell in pending) if model.startswith(_TINY)
    }
    missing = [base for base in bases.values() if not base_folder(config, base).exists()]
    for folder in (run.output, run.shared):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    store_plan(run.output, {cell.key: cell.name for cell in run.recipe.cells})
    progress = Progress(["base"] * len(missing) + ["cell"] * len(pending))
    ledger = Ledger(run.output, pending, progress, partial(_row, run), run.forget_work)
    with ledger.interruptible():
        broken = _make_bases(config, missing, progress)
        for cell in [cell for cell in pending if cell.model in broken]:
            ledger.fail(cell, f"no base model: {broken[cell.model]}")
        jobs = []
        for cell in ledger.left.values():
            folder = base_folder(config, bases[cell.model]) if cell.model in bases else run.checkpoints / cell.model
            jobs.append((cell, _job(run, cell, folder)))
        ledger.run(runner, jobs)
    rows = {row["spec_key"]: row for row in read_rows(run.output)}
    return [rows[cell.key] for cell in run.recipe.cells]


def _base(run: RecipeRun, model: str) -> BaseSpec:
    return BaseSpec(model=model, data=EASY_VQA, pretrain_steps=run.pretrain_steps, seed=StudyConfig.seed)


def _make_bases(config: StudyConfig, missing: list[BaseSpec], progress: Progress) -> dict[str, str]:
    """Makes the bases; returns the reason of each model whose base failed."""
    if not missing:
        return {}
    inputs = prepare_inputs(data=None, images=None, eval_samples=config.eval_samples)
    outcomes = {base.model: make_base(config, base, inputs, progress) for base in missing}
    return {model: reason for model, reason in outcomes.items() if reason}


def _job(run: RecipeRun, cell: RecipeCell, base: Path) -> Job:
    work = run.work_folder(cell)
    if run.redo:
        run.forget_work(cell)
    work.mkdir(parents=True, exist_ok=True)
    spec = {
        "spec": asdict(cell), "base": str(base), "datasets": str(run.datasets or ""), "folder": str(work),
        "threads": max(1, run.threads // run.processes), "device": run.device, "shard": run.shard,
        "refuse_bad_records": run.refuse_bad_records,
    }  # fmt: skip
    return Job(
        module="mmpeft_fast.study.recipes.cell",
        spec=spec,
        log=run.output / "logs" / f"{file_name(cell.name)}-{cell.key}.log",
        threads=run.threads,
        processes=1 if cell.method == NO_METHOD else run.processes,
        micro_batch=cell.training.get("batch_size", TrainConfig.batch_size) if run.halve_on_oom else None,
    )


def _row(run: RecipeRun, cell: RecipeCell, outcome: dict, elapsed_s: float) -> dict:
    return {
        "spec_key": cell.key,
        "recipe": run.recipe.name,
        "cell": cell.name,
        **asdict(cell),
        "reason": None,
        **outcome,
        "device": run.device,
        "device_name": device_name(run.device),
        "threads": run.threads,
        "processes": run.processes,
        "sharded": run.shard,
        "versions": versions(),
        "elapsed_s": round(elapsed_s, 1),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }

"""Runs a recipe: makes the small bases, runs every cell that has no row yet, and keeps one row a cell."""

import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from mmpeft_fast.data.sets import SETS
from mmpeft_fast.doctor import device_name, versions
from mmpeft_fast.study.cells import EASY_VQA, BaseSpec, StudyConfig
from mmpeft_fast.study.inputs import prepare_inputs
from mmpeft_fast.study.process import run_job
from mmpeft_fast.study.progress import Progress
from mmpeft_fast.study.recipes.recipe import Recipe, RecipeCell
from mmpeft_fast.study.run import RESULTS_NAME, base_folder, make_base, read_rows, store_plan, store_row

_TINY = "tiny-"


@dataclass(frozen=True, kw_only=True)
class RecipeRun:
    """A recipe, where its rows go (output), and what it runs with.

    shared: the folder of the small bases, which recipes and the study share. checkpoints: a folder with a folder for
    each model, by its name. datasets: the folder of all data sets. Neither is needed for models that are built on the
    spot.
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

    @property
    def results_path(self) -> Path:
        return self.output / RESULTS_NAME

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


def run_recipe(run: RecipeRun) -> list[dict]:
    """Runs the cells that have no successful row yet, each in a fresh process; returns the recipe's rows in its order.

    Raises:
        ValueError: a checkpoint or data set is missing, or an existing results file cannot be read; nothing has run.
        KeyboardInterrupt: after Ctrl-C; what is done is kept, and its message says how to go on.
    """
    run.check()
    rows = {row["spec_key"]: row for row in read_rows(run.results_path)}
    pending = [cell for cell in run.recipe.cells if run.redo or rows.get(cell.key, {}).get("status") != "ok"]
    config = StudyConfig(output=run.shared, threads=run.threads, pretrain_steps=run.pretrain_steps)
    bases = {
        model: _base(run, model) for model in dict.fromkeys(cell.model for cell in pending) if model.startswith(_TINY)
    }
    missing = [base for base in bases.values() if not base_folder(config, base).exists()]
    for folder in (run.output, run.shared):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    store_plan(run.output, {cell.key: cell.name for cell in run.recipe.cells})
    progress = Progress(["base"] * len(missing) + ["cell"] * len(pending))
    num_done = 0
    try:
        broken = _make_bases(config, missing, progress)
        for cell in pending:
            folder = base_folder(config, bases[cell.model]) if cell.model in bases else run.checkpoints / cell.model
            row = _run_cell(run, cell, folder, broken.get(cell.model), progress)
            if row["status"] == "failed":
                progress.say(f"failed: {cell.name}: {row['reason']}")
            store_row(run.results_path, row)
            num_done += 1
    except KeyboardInterrupt:
        message = f"{num_done} of {len(pending)} cells are done; the same command goes on from here"
        raise KeyboardInterrupt(message) from None
    finally:
        progress.clear()
    rows = {row["spec_key"]: row for row in read_rows(run.results_path)}
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


def _run_cell(run: RecipeRun, cell: RecipeCell, base: Path, broken: str | None, progress: Progress) -> dict:
    started = time.monotonic()
    progress.start(cell.name)
    if broken:
        outcome = {"status": "failed", "reason": f"no base model: {broken}"}
    else:
        job = {"spec": asdict(cell), "base": str(base), "datasets": str(run.datasets or "")}
        outcome = run_job(
            "mmpeft_fast.study.recipes.cell",
            {**job, "threads": run.threads, "device": run.device, "refuse_bad_records": run.refuse_bad_records},
            log_path=run.output / "logs" / f"{cell.name.replace('/', '_').replace(' ', '-')}-{cell.key}.log",
            threads=run.threads,
            offline=True,
            tick=progress.tick,
        )
    progress.finish()
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
        "versions": versions(),
        "elapsed_s": round(time.monotonic() - started, 1),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }

"""`mmpeft-fast study`: options, the run, the table and the report."""

import argparse
import importlib
import os
import time
from pathlib import Path

from mmpeft_fast.study.cells import AXES, DEVICES, DTYPES, IMPLEMENTATIONS, METHODS, TINY_MODELS, StudyConfig
from mmpeft_fast.study.rows import SUCCESS

# What the study does besides running, and the module that does it.
ACTIONS = {
    "recipes": ("mmpeft_fast.study.recipes.command", "the papers' experiments, which `study --recipe NAME` runs"),
    "status": ("mmpeft_fast.study.status", "what is done, what failed and why, and what is still to come"),
    "diff": ("mmpeft_fast.study.diff", "the same cells of two runs side by side"),
    "data": ("mmpeft_fast.study.data_check", "check DIR: which data sets are there, complete, and where to get them"),
}
EPILOG = """\
examples:
  mmpeft-fast study                                        all cells, about 8 minutes on 2 CPU cores
  mmpeft-fast study --methods lora ia3 --models tiny-llava  some of them
  mmpeft-fast study --data mine.json --images pictures/     your own conversations
  mmpeft-fast study --base path/to/llava-1.5-7b --dtype bf16 --steps 20 --batch-size 4
  mmpeft-fast study --recipe location --small               an experiment of the papers, on the tiny models
  mmpeft-fast study --report-only                           write the report again from the rows

Cells that have a row in OUTPUT/cells already are skipped; Ctrl-C keeps what is done, and the same command goes on.
A cell that fails is a row with its reason (out of memory: oom), and the exit code is 1 in the end.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mmpeft-fast study`."""
    defaults = {name: field.default for name, field in StudyConfig.__dataclass_fields__.items()}
    parser.description = (
        "Fine-tunes each model with each method, by HF PEFT and fused, beside the frozen model's forward + dX, and "
        "writes a row a cell, results.jsonl, report.html and a table."
    )
    parser.epilog = EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", help="in place of a run:")
    for name, (module, summary) in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        importlib.import_module(module).add_arguments(action)

    cells = parser.add_argument_group("which cells")
    cells.add_argument("--models", nargs="+", metavar="M", help=f"any of: {', '.join(TINY_MODELS)} (default: all)")
    cells.add_argument("--methods", nargs="+", metavar="M", help=f"any of: {', '.join(METHODS)} (default: the papers')")
    cells.add_argument(
        "--implementations", nargs="+", metavar="I", help=f"any of: {', '.join(IMPLEMENTATIONS)} (default: all)"
    )
    cells.add_argument(
        "--axes",
        nargs="+",
        metavar="A",
        help=f"what is varied on the first tiny model, any of: {', '.join(AXES)} (size=r=4: that value alone); or none "
        "(default: all)",
    )
    cells.add_argument("--redo", action="store_true", help="run cells again that have a row already")

    recipes = parser.add_argument_group("a paper's experiment (`study recipes` lists them)")
    recipes.add_argument("--recipe", metavar="NAME", help="run its cells; --models, --methods and --redo choose")
    recipes.add_argument("--small", action="store_true", help="on the tiny models and easy-vqa, in minutes")
    recipes.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="a folder with each model's checkpoint in a folder of its name",
    )
    recipes.add_argument("--datasets", type=Path, metavar="DIR", help="the folder of all data sets")
    recipes.add_argument(
        "--refuse-bad-records",
        action="store_true",
        help="a record that cannot be used ends its cell (default: skipped)",
    )

    recipes.add_argument(
        "--processes", type=int, default=1, metavar="N", help="data-parallel processes of a cell (default: 1)"
    )
    recipes.add_argument("--shard", action="store_true", help="spread a cell's model over its processes (FSDP2)")
    recipes.add_argument(
        "--halve-on-oom",
        action="store_true",
        help="run a cell out of memory again with half of its micro-batch, at the same batch a step",
    )

    inputs = parser.add_argument_group("models and data")
    inputs.add_argument("--base", metavar="PATH|NAME", help="a real checkpoint in place of the tiny models")
    inputs.add_argument("--data", type=Path, metavar="FILE", help="conversations in LLaVA's JSON (default: easy-vqa)")
    inputs.add_argument("--images", type=Path, metavar="DIR", help="the image folder of --data")

    settings = parser.add_argument_group("settings of every cell")
    for name, text in {
        "steps": "training steps",
        "batch_size": "samples per step",
        "eval_samples": "held-out samples for the accuracy",
        "pretrain_steps": "steps that a tiny model's decoder is trained before the cells; 0: nothing is",
        "seed": "seed of weights, batches and dropout",
    }.items():
        option = f"--{name.replace('_', '-')}"
        settings.add_argument(option, type=int, default=defaults[name], help=f"{text} (default: {defaults[name]})")
    settings.add_argument("--threads", type=int, help="CPU threads (default: the cores this process may use)")
    settings.add_argument("--device", choices=DEVICES, help="default: cuda where there is one")
    settings.add_argument("--dtype", choices=DTYPES, default=defaults["dtype"], help="default: fp32")

    running = parser.add_argument_group("running")
    running.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="on a Ray cluster (extra `ray`), many cells at once",
    )
    running.add_argument(
        "--gpus-per-cell",
        type=float,
        metavar="G",
        help="with --ray: GPUs of a cell; below 1, cells share one (default: 1 where --device is cuda)",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("results/study"), help="folder (default: results/study)")
    output.add_argument("--report-only", action="store_true", help="run nothing, write the report from the rows")


def run(args: argparse.Namespace) -> int:
    """Runs the study, or one of `ACTIONS`; returns 0, or 1 if a cell failed. Bad input raises ValueError first."""
    if args.action is not None:
        return importlib.import_module(ACTIONS[args.action][0]).run(args)
    _check_recipe_options(args)
    if args.recipe is not None:
        from mmpeft_fast.study.recipes.command import run_named

        threads, device = args.threads or _num_cores(), _device(args.device)
        return run_named(args, threads=threads, device=device, runner=_runner(args))
    from mmpeft_fast.study.report import write_report
    from mmpeft_fast.study.rows import RESULTS_NAME, read_rows
    from mmpeft_fast.study.run import newest_rows, run_study
    from mmpeft_fast.study.table import terminal_table

    results_path = args.output / RESULTS_NAME
    if args.report_only:
        rows = newest_rows(read_rows(args.output))
        if not rows:
            raise ValueError(f"--report-only: expected rows in {args.output}, found none; run the study first")
        rows_from = "read"
    else:
        started = time.monotonic()
        rows = run_study(_config(args), _runner(args))
        minutes, seconds = divmod(round(time.monotonic() - started), 60)
        rows_from = f"{minutes}:{seconds:02d} min"
    report_path = write_report(rows, args.output)
    print(terminal_table(rows))
    print(f"\nreport   {report_path}\nresults  {results_path} ({len(rows)} rows, {rows_from})")
    return 0 if all(row["status"] == SUCCESS for row in rows) else 1


def _runner(args: argparse.Namespace):
    """Where the cells run: here in turn, or on the cluster of --ray."""
    from mmpeft_fast.study.in_turn import InTurn
    from mmpeft_fast.study.on_ray import OnRay

    if args.ray is None:
        if args.gpus_per_cell is not None:
            raise ValueError(f"--gpus-per-cell: expected only beside --ray, got {args.gpus_per_cell}")
        return InTurn()
    gpus = (0.0 if _device(args.device) == "cpu" else 1.0) if args.gpus_per_cell is None else args.gpus_per_cell
    if not 0 <= gpus <= 1024:
        raise ValueError(f"--gpus-per-cell: expected 0 to 1024, got {gpus}")
    return OnRay(args.ray or None, gpus=gpus)


def _config(args: argparse.Namespace) -> StudyConfig:
    """The configuration that the options mean; options left out take its defaults."""
    if args.base is not None and args.models is not None:
        raise ValueError("expected either --base or --models, got both")
    axes = {} if args.axes is None else {"axes": () if args.axes == ["none"] else tuple(args.axes)}
    given = axes | {
        name: tuple(value) for name in ("models", "methods", "implementations") if (value := getattr(args, name))
    }
    plain = (
        "base",
        "data",
        "images",
        "redo",
        "output",
        "steps",
        "batch_size",
        "eval_samples",
        "pretrain_steps",
        "seed",
    )
    config = StudyConfig(
        **given,
        **{name: getattr(args, name) for name in (*plain, "dtype")},
        threads=_num_cores() if args.threads is None else args.threads,
        device=_device(args.device),
    )
    if config.base is not None:
        _check_base(config.base)
    return config


def _check_recipe_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that mean nothing beside, or without, --recipe."""
    only_without = (
        "implementations",
        "axes",
        "base",
        "data",
        "images",
        "steps",
        "batch_size",
        "eval_samples",
        "seed",
        "dtype",
    )
    defaults = {name: StudyConfig.__dataclass_fields__[name].default for name in only_without} | {
        "implementations": None,
        "axes": None,
    }
    only_with = dict.fromkeys(("small", "refuse_bad_records", "shard", "halve_on_oom"), False)
    only_with |= dict.fromkeys(("checkpoints", "datasets")) | {"processes": 1}
    for name, default in (only_with if args.recipe is None else defaults).items():
        if getattr(args, name) != default:
            beside = "only beside" if args.recipe is None else "not beside"
            raise ValueError(f"--{name.replace('_', '-')}: expected {beside} --recipe, got {getattr(args, name)!s}")


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _device(wanted: str | None) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected a CUDA device for cuda, torch sees none")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _check_base(name_or_path: str) -> None:
    """Reads the checkpoint's configuration, so that a wrong one ends the run before it starts."""
    from transformers import AutoConfig

    from mmpeft_fast.models import FAMILIES, UNLOADABLE, check_config

    try:
        config = AutoConfig.from_pretrained(name_or_path)
        check_config(config)
        model_type = config.model_type
    except UNLOADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--base: expected a checkpoint's folder or name, got {name_or_path!r}: {reason}") from error
    known = [name for family in FAMILIES.values() for name in family.model_types]
    if model_type not in known:
        raise ValueError(f"--base: expected a model of type {', '.join(known)}, got type {model_type!r}")

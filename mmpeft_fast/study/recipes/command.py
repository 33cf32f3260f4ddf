"""`mmpeft-fast study recipes`: what there is to run and what it costs; and the run of one (`study --recipe NAME`)."""

import argparse
import json
import sys
from dataclasses import asdict, replace


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `study recipes`."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes (default: all)")
    parser.add_argument("--small", action="store_true", help="as they run on models that are built on the spot")
    parser.add_argument(
        "--plan", metavar="DEVICE", help="predict time and memory there, a second or two a different step"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the recipes; returns 0."""
    from mmpeft_fast.plan.devices import device_named
    from mmpeft_fast.study.recipes import FULL, RECIPES, SMALL, make_recipe
    from mmpeft_fast.study.recipes.cost import Planner, cost_of

    planner = None if args.plan is None else Planner(device_named(args.plan))
    scale = SMALL if args.small else FULL
    found = []
    for name in args.names or RECIPES:
        recipe = make_recipe(name, scale)
        cost = cost_of(recipe, planner, tick=lambda name=name: _say(f"planning {name}"))
        found.append((recipe, cost))
    _say("")
    if args.json:
        print(json.dumps([_as_json(recipe, cost) for recipe, cost in found], indent=1))
    else:
        print("\n\n".join(_text(recipe, cost) for recipe, cost in found))
    return 0


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _as_json(recipe, cost) -> dict:
    fields = {name: getattr(recipe, name) for name in ("name", "title", "source")}
    published = [asdict(each) for each in recipe.published]
    cells = [cell.name for cell in recipe.cells]
    return {**fields, "cells": cells, "cost": asdict(cost), "published": published, "notes": list(recipe.notes)}


def _text(recipe, cost) -> str:
    lines = [
        f"{recipe.name}: {recipe.title} ({recipe.source})",
        f"  {len(recipe.cells)} cells, {cost.trained_samples:,} samples trained, {cost.evaluated_samples:,} evaluated, "
        f"{len(recipe.published)} published numbers",
    ]
    if cost.hours is not None:
        lines.append(f"  {cost.hours:,.1f} hours of training on one {cost.device}, {cost.peak_gib:.1f} GiB at most")
    return "\n".join([*lines, *(f"  note: {note}" for note in recipe.notes)])


def run_named(args: argparse.Namespace, *, threads: int, device: str, runner) -> int:
    """`study --recipe NAME`: runs it, prints its table and writes `summary.json`; returns 1 if a cell failed."""
    from mmpeft_fast.atomic import write_text
    from mmpeft_fast.study.recipes import FULL, SMALL, make_recipe
    from mmpeft_fast.study.recipes.page import write_page
    from mmpeft_fast.study.recipes.run import RecipeRun, run_recipe
    from mmpeft_fast.study.recipes.table import recipe_table, summary
    from mmpeft_fast.study.rows import SUCCESS

    recipe = make_recipe(args.recipe, SMALL if args.small else FULL)
    for option, axis in (("models", "model"), ("methods", "method")):
        if wanted := getattr(args, option):
            recipe = replace(recipe, cells=_chosen(recipe, axis, wanted))
    output = args.output / f"{recipe.name}{'-small' if args.small else ''}"
    rows = run_recipe(
        RecipeRun(
            recipe=recipe,
            output=output,
            shared=args.output,
            checkpoints=args.checkpoints,
            datasets=args.datasets,
            threads=threads,
            device=device,
            pretrain_steps=args.pretrain_steps,
            redo=args.redo,
            refuse_bad_records=args.refuse_bad_records,
            processes=args.processes,
            shard=args.shard,
            halve_on_oom=args.halve_on_oom,
        ),
        runner,
    )
    entries = summary(recipe, rows, any_model=args.small)
    write_text(output / "summary.json", json.dumps(entries, indent=1))
    print(recipe_table(recipe, entries))
    print(f"\nreport   {write_page(recipe, entries, output)}\nresults  {output}")
    return 0 if all(row["status"] == SUCCESS for row in rows) else 1


def _chosen(recipe, axis: str, wanted: list[str]) -> tuple:
    known = list(dict.fromkeys(getattr(cell, axis) for cell in recipe.cells))
    for name in wanted:
        if name not in known:
            raise ValueError(f"--{axis}s: recipe {recipe.name} has {', '.join(known)}, got {name!r}")
    return tuple(cell for cell in recipe.cells if getattr(cell, axis) in wanted)

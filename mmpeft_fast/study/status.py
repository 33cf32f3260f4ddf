"""`mmpeft-fast study status DIR`: what is done, what failed and why, and what is still to come."""

import argparse
import json
from pathlib import Path

from mmpeft_fast.study.rows import CANCELLED, CELLS, PLAN_NAME, SUCCESS, read_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `study status`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a run's output folder; runs below it are told too")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the state of every run; returns 1 where a cell failed. Raises ValueError where there is no run."""
    found = {path.parent for name in (PLAN_NAME, CELLS) for path in args.folder.rglob(name)}
    if not found:
        raise ValueError(f"{args.folder}: expected the output folder of a study, found no {PLAN_NAME} or {CELLS}")
    states = [_state(folder) for folder in sorted(found)]
    if args.json:
        print(json.dumps(states, indent=1))
    else:
        print("\n".join(line for state in states for line in _lines(state)))
    return 1 if any(state["failed"] for state in states) else 0


def _state(folder: Path) -> dict:
    """The state of a run: of its plan's cells, or of all rows where there is no plan."""
    from mmpeft_fast.json_text import read
    from mmpeft_fast.study.cells import cell_name

    rows = {row["spec_key"]: row for row in read_rows(folder)}
    plan = {key: cell_name(row) for key, row in rows.items()}
    if (folder / PLAN_NAME).exists():
        plan = read(folder / PLAN_NAME)
    planned = {key: rows.get(key) for key in plan}
    failed = {
        plan[key]: row["reason"] for key, row in planned.items() if row and row["status"] not in (SUCCESS, CANCELLED)
    }
    return {
        "folder": str(folder),
        "cells": len(plan),
        "done": sum(1 for row in planned.values() if row and row["status"] == SUCCESS),
        "failed": failed,
        "pending": [plan[key] for key, row in planned.items() if row is None or row["status"] == CANCELLED],
        "older_rows": len(rows.keys() - plan.keys()),
        "elapsed_s": round(sum(row.get("elapsed_s") or 0 for row in planned.values() if row), 1),
        "newest": max((row["time"] for row in rows.values() if row.get("time")), default=None),
    }


def _lines(state: dict) -> list[str]:
    minutes, seconds = divmod(round(state["elapsed_s"]), 60)
    lines = [
        f"{state['folder']}: {state['done']} of {state['cells']} cells done, {len(state['failed'])} failed, "
        f"{len(state['pending'])} to come; {minutes}:{seconds:02d} min, newest row {state['newest'] or 'none'}"
    ]
    lines += [f"  failed: {name}: {reason}" for name, reason in state["failed"].items()]
    if state["pending"]:
        lines.append(f"  next: {state['pending'][0]}")
    if state["older_rows"]:
        lines.append(f"  {state['older_rows']} rows of other settings or of older code")
    return lines

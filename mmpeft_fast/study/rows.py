"""The rows of a run: one JSON file a cell in `cells/`, each seen whole or not at all, and all of them in results.jsonl.

A row says what ran, what was trained and measured, on which machine, with which versions, and how it ended.
"""

import json
import os
import re
import sys
from pathlib import Path

from mmpeft_fast.atomic import write_text
from mmpeft_fast.json_text import parse, read_utf8

CELLS, RESULTS_NAME, PLAN_NAME = "cells", "results.jsonl", "plan.json"
# How a cell ended: with all it was to measure; for lack of memory; for another reason; by whoever ran it.
SUCCESS, OOM, FAILED, CANCELLED = STATUSES = ("success", "oom", "failed", "cancelled")
_REQUIRED = {"spec_key", "status", "model", "method", "implementation"}
_ASIDE = ".corrupt"


def read_rows(path: Path) -> list[dict]:
    """The rows of a run's folder, oldest first, or of a results.jsonl; none where there is neither.

    A cell's file that holds no row is set aside, under a name that ends in .corrupt, and named on standard error: the
    cell counts as not run. Raises ValueError for a line of a results.jsonl that is no row.
    """
    if path.is_file():
        lines = read_utf8(path).splitlines()
        return [_row(line, f"{path} line {number}") for number, line in enumerate(lines, start=1)]
    rows = []
    for file in sorted((path / CELLS).glob("*.json")):
        try:
            rows.append((_row(read_utf8(file), str(file)), file.stat().st_mtime_ns))
        except ValueError as error:
            os.replace(file, file.with_name(file.name + _ASIDE))
            print(f"set aside: {error}", file=sys.stderr, flush=True)
    return [row for row, _ in sorted(rows, key=lambda pair: (pair[0].get("time") or "", pair[1]))]


def store_row(folder: Path, row: dict) -> None:
    """Keeps a row in place of an older one of the same cell, and all rows of the folder in its results.jsonl."""
    (folder / CELLS).mkdir(parents=True, exist_ok=True)
    write_text(folder / CELLS / f"{row['spec_key']}.json", json.dumps(row, indent=1) + "\n")
    write_text(folder / RESULTS_NAME, "".join(json.dumps(each) + "\n" for each in read_rows(folder)))


def store_plan(folder: Path, cells: dict[str, str]) -> None:
    """Writes down which cells a run has, by key and name, so that `study status` knows what is still to come."""
    write_text(folder / PLAN_NAME, json.dumps(cells, indent=1))


def file_name(words: str) -> str:
    """A cell's name as part of a file's."""
    return re.sub(r"[^\w.=+-]+", "-", words)


def _row(text: str, where: str) -> dict:
    row = parse(text, where)
    if not isinstance(row, dict) or not row.keys() >= _REQUIRED or row["status"] not in STATUSES:
        raise ValueError(f"{where}: expected a row of the study, got {text[:40]!r}")
    return row

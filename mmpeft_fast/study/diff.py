"""`mmpeft-fast study diff A B`: the same cells of two runs, on two devices or of two versions, side by side."""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mmpeft_fast.study.rows import SUCCESS

# What is compared: a row's number, and whether more of it is worse.
MORE_IS_WORSE = {
    "step_ms_p50": True,
    "tokens_per_s": False,
    "saved_mib": True,
    "peak_mib": True,
    "loss_last": True,
    "accuracy": False,
}
SCORES = "scores"  # a recipe's, a number for each set and metric
_NAMES = (*MORE_IS_WORSE, SCORES)
_WORSE_METRICS = ("hallucination", "shape_hallucination")  # of which less is better


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `study diff`."""
    for name, text in (("a", "a run's output folder, or its results.jsonl"), ("b", "another one, compared with it")):
        parser.add_argument(name, type=Path, metavar=name.upper(), help=text)
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="X",
        help="exit with 1 where a number of B is worse than A's by more than X percent, or a cell of A failed or is "
        "missing in B",
    )
    parser.add_argument("--numbers", nargs="+", metavar="N", help=f"only these of: {', '.join(_NAMES)} (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints each common cell's numbers; returns 1 beyond --fail-above. Raises ValueError where nothing is common."""
    names = args.numbers or _NAMES
    for name in names:
        if name not in _NAMES:
            raise ValueError(f"--numbers: expected some of {', '.join(_NAMES)}, got {name!r}")
    if args.fail_above is not None and not args.fail_above >= 0:
        raise ValueError(f"--fail-above: expected a percentage of at least 0, got {args.fail_above}")
    first, second = _rows(args.a), _rows(args.b)
    common = [name for name in first if name in second]
    if not common:
        raise ValueError(f"{args.a} and {args.b}: expected cells that both have, found none")
    changes = [change for cell in common for change in _changes(cell, names, first[cell], second[cell])]
    done = [{name for name, row in rows.items() if row["status"] == SUCCESS} for rows in (first, second)]
    lost = [name for name in first if name in done[0] - done[1]]
    new = [name for name in second if name not in first]
    if args.json:
        print(json.dumps({"changes": changes, "lost": lost, "new": new}, indent=1))
    else:
        print("\n".join(_lines(changes, lost, new)))
    if args.fail_above is None:
        return 0
    return 1 if lost or any(change["worse_percent"] > args.fail_above for change in changes) else 0


def _rows(path: Path) -> dict[str, dict]:
    """The newest row of each cell, by its name, of a folder or a file."""
    from mmpeft_fast.study.cells import cell_name
    from mmpeft_fast.study.rows import read_rows

    rows = sorted(read_rows(path), key=lambda row: row["time"])
    if not rows:
        raise ValueError(f"{path}: expected a study's results, found none")
    return {cell_name(row): row for row in rows}


def _changes(cell: str, names: Sequence[str], first: dict, second: dict) -> Iterator[dict]:
    """How much the numbers changed that both runs have; worse_percent is negative where one got better."""
    before, after = _numbers(first, names), _numbers(second, names)
    for name in before:
        if name in after:
            (a, more_is_worse), (b, _) = before[name], after[name]
            percent = 0.0 if a == b else 100 * (b - a) / abs(a) if a else math.copysign(math.inf, b)
            worse = percent if more_is_worse else -percent
            yield {"cell": cell, "number": name, "a": a, "b": b, "percent": percent, "worse_percent": worse}


def _numbers(row: dict, names: Sequence[str]) -> dict[str, tuple[float, bool]]:
    """A row's numbers by name, and whether more is worse; of a recipe's scores those after the last epoch."""
    from mmpeft_fast.study.recipes.table import headline, last_scores

    found = {name: (row[name], MORE_IS_WORSE[name]) for name in names if name != SCORES and row.get(name) is not None}
    if SCORES in names:
        for score in last_scores(row):
            name = f"{score['set']} {score['metric']}"
            found[name] = headline(score), score["metric"] in _WORSE_METRICS
    return found


def _lines(changes: list[dict], lost: list[str], new: list[str]) -> list[str]:
    titles = ["cell", "number", "A", "B", "change"]
    cells = [
        [each["cell"], each["number"], f"{each['a']:.4g}", f"{each['b']:.4g}", f"{each['percent']:+.1f} %"]
        for each in changes
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells)]
    text = [
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        )
        for line in (titles, *cells)
    ]
    text += [f"not done in B: {name}" for name in lost]
    return text + [f"only in B: {name}" for name in new]

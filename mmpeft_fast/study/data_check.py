"""`mmpeft-fast study data check DIR`: which data sets are there, which are missing, and where each is published."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

SHOWN_SENTENCES = 3


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """A split of a data set: the files that are missing, or its usable samples and what is wrong with the others."""

    data_set: str
    split: str
    published: str
    missing: tuple[str, ...] = ()
    usable: int = 0
    bad: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `study data check`."""
    parser.add_argument("check", choices=("check",), help="the only thing to do with them")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of all data sets")
    parser.add_argument("--dataset", metavar="NAME", help="only this one; files that are missing are then a failure")
    parser.add_argument("--decode", action="store_true", help="decode every image to its last pixel, not its header")
    parser.add_argument("--json", action="store_true", help="one JSON list, with every sentence")


def run(args: argparse.Namespace) -> int:
    """Prints what is there; returns 1 where a record is bad, or nothing (of --dataset: not everything) is there."""
    from mmpeft_fast.data.sets import SETS

    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: expected the folder of the data sets, found no such folder")
    if args.dataset is not None and args.dataset not in SETS:
        raise ValueError(f"--dataset: expected one of {', '.join(SETS)}, got {args.dataset!r}")
    names = list(SETS) if args.dataset is None else [args.dataset]
    reports = [_report(SETS[name], args.folder, split, args.decode) for name in names for split in SETS[name].splits]
    if args.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    else:
        for name in names:
            print(f"{name}: {SETS[name].title}, published at {SETS[name].published}")
            print("\n".join(line for report in reports if report.data_set == name for line in _lines(report)))
    num_missing = sum(bool(report.missing) for report in reports)
    is_complete = num_missing == 0 if args.dataset is not None else num_missing < len(reports)
    return 0 if is_complete and not any(report.bad for report in reports) else 1


def _report(data_set, folder: Path, split: str, decode: bool) -> SplitReport:
    from mmpeft_fast.data.sets import BadRecords, decodable, load_set

    known = {"data_set": data_set.name, "split": split, "published": data_set.published}
    if missing := data_set.missing(folder, split):
        return SplitReport(**known, missing=tuple(missing))
    bad = BadRecords(skip=True)
    try:
        samples = load_set(data_set, folder, split, bad=bad)
        samples = decodable(samples, bad) if decode else samples
    except ValueError as error:
        return SplitReport(**known, bad=(*bad.sentences, str(error)))
    return SplitReport(**known, usable=len(samples), bad=tuple(bad.sentences))


def _lines(report: SplitReport) -> list[str]:
    if report.missing:
        return [f"  {report.split}: missing {', '.join(report.missing)}"]
    lines = [f"  {report.split}: {report.usable} usable samples, {len(report.bad)} bad records"]
    lines += [f"    {sentence}" for sentence in report.bad[:SHOWN_SENTENCES]]
    if len(report.bad) > SHOWN_SENTENCES:
        lines.append(f"    and {len(report.bad) - SHOWN_SENTENCES} more; --json shows all")
    return lines

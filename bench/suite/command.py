"""`mmpeft-fast bench run | compare | report`: options, and what is printed."""

import argparse
import sys
import warnings
from pathlib import Path

EPILOG = """\
examples:
  mmpeft-fast bench run --seconds 120 --out results/bench/suite.jsonl
  mmpeft-fast bench run --growth tokens rank layers --seconds 300 --out results/bench/growth.jsonl
  mmpeft-fast bench run --sweep 300 --seconds 3600 --out results/bench/sweep.jsonl     # again: goes on
  mmpeft-fast bench compare old.jsonl new.jsonl                     # exit status 1 where something got worse
  mmpeft-fast bench report results/bench/suite.jsonl results/bench/growth.jsonl --output results/bench
"""
_DEFAULTS = {
    "cpu": ("peft_bf16", "fused", "composite", "manual", "compile", "fused_torch", "liger", "unsloth"),
    "cuda": (
        "peft_bf16", "fused", "composite", "manual", "graphs", "compile", "fused_torch", "fused_cuda", "liger",
        "unsloth",
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the three sub-commands."""
    parser.epilog = EPILOG
    commands = parser.add_subparsers(dest="action", metavar="run|compare|report", required=True)

    run_parser = commands.add_parser("run", help="measure cases, implementations in turn; one row each")
    run_parser.add_argument(
        "--seconds", type=float, default=120.0, metavar="N",
        help="the cases that say most in this time; what is left out is said (default: 120)",
    )  # fmt: skip
    run_parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    run_parser.add_argument(
        "--dtype", nargs="+", metavar="D", help="of bf16, fp16, fp32 (default: bf16 and, on a CPU, fp32)"
    )
    run_parser.add_argument(
        "--what", nargs="+", metavar="W", help="of step, layer, op, the registry's (default: step and layer)"
    )
    run_parser.add_argument("--models", nargs="+", metavar="M", help="whose dimensions (default: all of the suite)")
    run_parser.add_argument("--methods", nargs="+", metavar="M", help="methods (default: all of the study)")
    run_parser.add_argument(
        "--implementations", nargs="+", metavar="I", help="beside frozen and peft (default: all that fit the device)"
    )
    run_parser.add_argument(
        "--growth", nargs="*", metavar="AXIS", help="instead: along tokens, rank, layers (default: all)"
    )
    run_parser.add_argument("--sweep", type=int, metavar="N", help="instead: N random shapes, fused against peft")
    run_parser.add_argument("--seed", type=int, default=0, help="of the sweep's shapes (default: 0)")
    run_parser.add_argument("--threads", type=int, default=0, metavar="N", help="of the CPU (default: torch's)")
    run_parser.add_argument("--out", type=Path, metavar="FILE", help="JSON-lines file to append the rows to")
    run_parser.add_argument("--list", action="store_true", help="print the cases in their order and stop")

    compare_parser = commands.add_parser("compare", help="a new file of rows against an old one")
    compare_parser.add_argument("old", type=Path, metavar="A")
    compare_parser.add_argument("new", type=Path, metavar="B")
    compare_parser.add_argument(
        "--absolute", action="store_true", help="milliseconds; else times over those of frozen in the same rounds"
    )

    report_parser = commands.add_parser("report", help="Markdown and one page with plots, from rows")
    report_parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    report_parser.add_argument(
        "--output", type=Path, default=Path("results/bench"), metavar="DIR",
        help="folder of suite.md and suite.html (default: results/bench)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit status: 0; of `compare` 1 where something got worse. Raises ValueError for bad input."""
    # What transformers and HF PEFT say to their own developers, with every model.
    warnings.filterwarnings("ignore", module="transformers|peft")
    try:
        return {"run": _run, "compare": _compare, "report": _report}[args.action](args)
    except KeyboardInterrupt as interrupt:
        if getattr(args, "out", None) is None:
            raise
        raise KeyboardInterrupt(f"the rows of whole cases are in {args.out}") from interrupt


def _some_of(option: str, given: list[str] | None, known: list[str]) -> list[str]:
    """What was given, or all that is known. Raises ValueError for what is not."""
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise ValueError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return list(dict.fromkeys(given)) if given else known


def _at_least(option: str, value: float | None, least: float) -> None:
    if value is not None and not least <= value < float("inf"):
        raise ValueError(f"{option}: expected at least {least:g}, got {value:g}")


def _device(given: str) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if given == "auto":
        return "cuda" if has_gpu else "cpu"
    if given not in _DEFAULTS or (given == "cuda" and not has_gpu):
        raise ValueError(f"--device: expected auto, cpu or, where there is a GPU, cuda, got {given!r}")
    return given


def _run(args: argparse.Namespace) -> int:
    for option, least in (("seconds", 1), ("sweep", 1), ("threads", 0)):
        _at_least(f"--{option}", getattr(args, option), least)
    if args.growth is not None and args.sweep is not None:
        raise ValueError("--growth, --sweep: expected one of them, got both")
    import torch

    from bench.suite import cases, implementations
    from bench.suite import run as runs
    from mmpeft_fast import METHODS
    from mmpeft_fast.dtypes import DTYPES

    device = _device(args.device)
    dtypes = _some_of("--dtype", args.dtype or ["bf16", "fp32"][: 2 if device == "cpu" else 1], sorted(DTYPES))
    models = _some_of("--models", args.models, list(cases.MODELS))
    methods = _some_of("--methods", args.methods, [name for name in METHODS if name != "layernorm-simp"])
    is_suite = args.growth is None and args.sweep is None
    names = args.implementations or list(_DEFAULTS[device] if is_suite else runs.SWEPT)
    taking_part = implementations.named(names)
    if args.growth is not None:
        parts = _growth_parts(args, models, methods, dtypes[0], device)
    elif is_suite:
        kinds = _some_of("--what", args.what or ["step", "layer"], list(cases.KINDS))
        parts = {None: cases.suite_cases(device, kinds, models, methods, dtypes)}
    else:
        parts = {None: [cases.random_case(args.seed, i, dtypes[0]) for i in range(args.sweep)]}
    if args.list:
        for case in (case for part in parts.values() for case in part):
            print(f"{case.flops / 1e9:10.1f} GFLOP  {case.name()}")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    known = runs.rows_so_far(args.out)
    budget = runs.Budget(args.seconds, runs.Machine(device, dtypes))
    emit = runs.saved_to(args.out, _Printer())
    emit([budget.machine.row()])
    if args.sweep is not None:
        return _sweep(args, parts[None], taking_part, budget, device, known, emit)
    if args.growth is not None:
        return _growth(parts, taking_part, budget, device, emit)
    runs.run_cases(parts[None], taking_part, budget, device, emit)
    return 0


def _growth_parts(args: argparse.Namespace, models, methods, dtype: str, device: str) -> dict[str, list]:
    """axis -> cases, of one model and method."""
    from bench.suite import cases, growth

    axes = _some_of("--growth", args.growth, list(growth.AXES))
    model = models[0] if args.models else {"cpu": "internvl3-1b", "cuda": "llava-1.5-7b"}[device]
    method = methods[0] if args.methods else "lora"
    if method not in cases.RANKED:
        if "rank" in (args.growth or ()):
            raise ValueError(f"--growth: expected a method with a rank for rank, got {method!r}")
        axes = [axis for axis in axes if axis != "rank"]
    base = cases.Case(
        model=model, method=method, rank=16 if method in cases.RANKED else 0, dtype=dtype, layers=2,
        seq_len={"cpu": 128, "cuda": 2048}[device], **cases.dimensions(model),
    )  # fmt: skip
    return {axis: cases.growth_cases(base, axis, device) for axis in axes}


def _growth(parts: dict[str, list], taking_part, budget, device: str, emit) -> int:
    """Along each axis, the seconds shared out evenly; then the exponents."""
    from bench.suite import growth
    from bench.suite import run as runs

    rows: list[dict] = []

    def keep_and_emit(found):
        rows.extend(found)
        emit(found)

    for axis, along in parts.items():
        share = runs.Budget(budget.seconds / len(parts), budget.machine)
        runs.run_cases(along, taking_part, share, device, keep_and_emit, growth=axis)
    print()
    for axis in parts:
        print("\n".join(growth.growth_lines(rows, axis)))
    return 0


def _sweep(args: argparse.Namespace, shapes: list, taking_part, budget, device: str, known: list[dict], emit) -> int:
    """Random shapes, those that the file has already left alone; prints where the fused path is worse."""
    from bench.suite import run as runs

    rows = runs.sweep(shapes, args.seed, taking_part, budget, device, known, emit)
    done = len({row["shape"] for row in rows})
    rest = "the same command goes on" if args.out else "with --out FILE the same command would go on"
    print(f"\n{done} of {len(shapes)} shapes measured{'' if done == len(shapes) else f'; {rest}'}")
    found = runs.faults(rows)
    print("\n".join(found) or "fused is nowhere slower than HF PEFT beyond the noise, and nowhere keeps more")
    return 0


class _Printer:
    """A line a row, the case above the rows that are of it."""

    def __init__(self):
        self._case = None

    def __call__(self, row: dict) -> None:
        from bench.suite.run import left_out_text

        if row["mode"] == "machine":
            rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in row["flops_per_s"].items())
            print(f"{row['device']}, {row['threads']} threads: {rates}, copies {row['bytes_per_s'] / 1e9:.1f} GB/s")
        elif row["mode"] == "left out":
            print(f"\n{left_out_text(row)}")
        else:
            if row["case"] != self._case:
                noise = f", noise {row['noise']:.1%}" if "noise" in row else ""
                print(f"\n{row['case']}{noise}")
            self._case = row["case"]
            print(f"  {row['implementation']:12} {_numbers(row)}")
        sys.stdout.flush()


def _numbers(row: dict) -> str:
    if "p50_ms" not in row:
        return f"{row['status']}: {row['reason']}"
    ratios = "  ".join(f"{row[f'x_{name}']:5.2f} x {name}" for name in ("frozen", "peft") if f"x_{name}" in row)
    spread = f"({row['p20_ms']:.1f} to {row['p80_ms']:.1f})"
    return f"{row['p50_ms']:9.2f} ms {spread:20} {ratios}  kept {row['saved_mib']:.1f} MiB"


def _compare(args: argparse.Namespace) -> int:
    from bench.suite.compare import compare, comparison_text, measured_rows

    old, new = measured_rows(args.old), measured_rows(args.new)
    found = compare(old, new, absolute=args.absolute)
    print(comparison_text(found, old, new))
    return int(any(one.is_worse for one in found))


def _report(args: argparse.Namespace) -> int:
    from bench.suite.compare import measured_rows
    from bench.suite.report import html_page, markdown
    from mmpeft_fast.atomic import write_text

    rows = [row for path in args.files for row in measured_rows(path, also=("machine", "left out"))]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, text in (("suite.md", markdown(rows)), ("suite.html", html_page(rows))):
        write_text(args.output / name, text)
        print(args.output / name)
    return 0

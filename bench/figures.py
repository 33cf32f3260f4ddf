"""The figures of README and docs, filled in from committed rows: python -m bench.figures [--check], make figures.

A figure stands between two comments that Markdown does not show:

    takes <!--fig h200 graphs ms-->164<!--/--> ms            one figure
    <!--fig step table-->                                    a table, on lines of its own
    | .. |
    <!--/-->

Its name says which row it comes from: `FIGURES`. What is between the comments is written by this program alone, and a
test fails where it is not what the rows say. What looks like a measurement and stands elsewhere is found by `loose`: it
is arithmetic, a goal or a setting, and listed as such here, or it is a figure without a row.
"""

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.rows import read_rows
from bench.table import table
from mmpeft_fast.atomic import write_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/design.md", "docs/kernels.md")
_FIGURE = re.compile(r"<!--fig (?P<name>[^>]+?)-->(?P<text>.*?)<!--/-->", re.S)
# A number with a unit of time, memory, rate or share, or a factor.
_MEASUREMENT = re.compile(r"(?<![\w.])\d[\d,.]*(?:x|\s?(?:ms|us|GiB|MiB|tokens/s|%|times))(?!\w)")


@functools.cache
def rows(path: str) -> tuple[dict, ...]:
    """The rows of a file below bench/results."""
    return tuple(read_rows(RESULTS / path))


def newest(path: str, **wanted: object) -> dict:
    """The last row that has these values."""
    found = [row for row in rows(path) if all(row.get(name) == value for name, value in wanted.items())]
    if not found:
        raise LookupError(f"{path}: expected a row with {wanted}, found none")
    return found[-1]


_LLAVA = "llava-1.5-7b lora r128 4x700"
_IMPLEMENTATIONS = {
    "frozen": "frozen model, forward + dX", "peft": "HF PEFT, its default (fp32 adapters)",
    "peft_bf16": "HF PEFT, bf16 adapters", "triton": "fused (fp32 adapters), eager",
    "graphs": "**fused, `fuse(model, cuda_graphs=True)`**",
}  # fmt: skip


def _h200(implementation: str, name: str = _LLAVA, mode: str = "step") -> dict:
    return newest("nvidia-h200/steps.jsonl", section="steps", mode=mode, implementation=implementation, name=name)


def _h200_table() -> str:
    lines = [
        "| | ms a step | / frozen | host ms | GiB kept for the backward | peak GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    frozen = _h200("frozen")["p50_ms"]
    for implementation, words in _IMPLEMENTATIONS.items():
        step, counts = _h200(implementation), _h200(implementation, mode="counts")
        cells = [
            f"{step['p50_ms']:.0f}", f"{step['p50_ms'] / frozen:.2f}", f"{step['host_ms']:.0f}",
            f"{counts['saved_mib'] / 1024:.2f}", f"{step['peak_allocated_mib'] / 1024:.1f}",
        ]  # fmt: skip
        if implementation == "graphs":
            cells = [f"**{cell}**" for cell in cells]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory_table() -> str:
    from bench.memory import IMPLEMENTATIONS, METHODS, MODELS

    names = list(IMPLEMENTATIONS)
    lines = [f"| GiB kept / peak | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for model in MODELS:
        for method in METHODS:
            cells = []
            for name in names:
                row = newest("intel-xeon-2-threads/memory.jsonl", model=model, method=method, implementation=name)
                cells.append("-" if "error" in row else f"{row['kept_gib']:.1f} / {row['peak_gib']:.1f}")
            lines.append(f"| {model} {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _planned_peak(implementation: str) -> Callable[[], str]:
    wanted = {"model": "llava-1.5-7b", "method": "lora", "implementation": implementation}
    return lambda: f"{newest('intel-xeon-2-threads/memory.jsonl', **wanted)['peak_gib']:.1f}"


def _kept(implementation: str) -> Callable[[], str]:
    """Kept bytes of the fused step on an H200 over another's."""
    counts = [functools.partial(_h200, name, mode="counts") for name in ("triton", implementation)]
    return lambda: f"{counts[0]()['saved_mib'] / counts[1]()['saved_mib']:.2f}"


def _old_kernel(kernel: str, field: str) -> Callable[[], str]:
    """Of the profile before prologues became element-wise kernels."""
    wanted = {"mode": "profile", "implementation": "triton", "run": 4, "kernel": kernel}
    return lambda: f"{newest('nvidia-h200/steps.jsonl', **wanted)[field]:.1f}"


def _masked_dx(*tiles: object) -> Callable[[], str]:
    """The least time of these tiles."""
    found = functools.partial(newest, "nvidia-h200/steps.jsonl", section="tiles", kernel="masked_dx", call="qkv")
    return lambda: f"{min(found(tile=tile)['p50_ms'] for tile in tiles):.3f}"


_MASKED_TILE = {"block_m": 128, "block_n": 256, "num_warps": 8, "num_stages": 3, "block_k": 64, "use_tma": True}


def _context(dtype: str, numerator: str, denominator: str, spec: str = ".1f") -> Callable[[], str]:
    def ratio() -> str:
        row = newest("intel-xeon-2-threads/context.jsonl", dtype=dtype, questions=5)
        return format(row[numerator] / row[denominator], spec)

    return ratio


def _host(name: str, tapes: bool = True) -> Callable[[], str]:
    return lambda: f"{newest('intel-xeon-2-threads/host.jsonl', tapes=tapes)[f'{name}_ms']:.2f}"


FIGURES: dict[str, Callable[[], str]] = {
    "step table": lambda: table(rows("amd-epyc-2-threads/step.jsonl")),
    "quantised table": lambda: table(rows("intel-xeon-2-threads/quantised.jsonl")),
    "recompute table": lambda: table(rows("intel-xeon-2-threads/recompute.jsonl")),
    "h200 table": _h200_table,
    "memory table": _memory_table,
    "plan nf4 peak": _planned_peak("fused_nf4"), "plan dense peak": _planned_peak("fused"),
    "h200 graphs / peft": lambda: f"{_h200('peft')['p50_ms'] / _h200('graphs')['p50_ms']:.1f}",
    "h200 graphs / peft_bf16": lambda: f"{_h200('peft_bf16')['p50_ms'] / _h200('graphs')['p50_ms']:.2f}",
    "h200 fused kernels ms": lambda: f"{_h200('triton', mode='counts')['gpu_ms']:.0f}",
    "h200 qwen text ms": lambda: f"{_h200('triton', 'qwen2.5-vl-7b lora r16 2x4096 text')['p50_ms']:.0f}",
    "h200 kept / peft": _kept("peft"), "h200 kept / peft_bf16": _kept("peft_bf16"),
    "old prologue ms": _old_kernel("prologue", "ms"), "old prologue least ms": _old_kernel("prologue", "least_ms"),
    "old prologue_backward ms": _old_kernel("prologue_backward", "ms"),
    "old prologue_backward least ms": _old_kernel("prologue_backward", "least_ms"),
    "masked dx ms": _masked_dx(_MASKED_TILE, None), "masked dx bare ms": _masked_dx("bare"),
    "masked dx two passes ms": _masked_dx("torch"),
    "context bf16": _context("bf16", "peft_separate_ms", "fused_shared_ms"),
    "context fp32": _context("fp32", "peft_separate_ms", "fused_shared_ms"),
    "context kept": _context("bf16", "peft_separate_kept_mib", "fused_shared_kept_mib", ".0f"),
    "context bf16 fused": _context("bf16", "fused_separate_ms", "fused_shared_ms"),
    "context fp32 fused": _context("fp32", "fused_separate_ms", "fused_shared_ms"),
    "context kept fused": _context("bf16", "fused_separate_kept_mib", "fused_shared_kept_mib"),
    "host fused": _host("fused"), "host peft": _host("peft"), "host frozen": _host("frozen"),
    "host fused untaped": _host("fused", tapes=False), "host peft untaped": _host("peft", tapes=False),
    "host frozen untaped": _host("frozen", tapes=False),
}  # fmt: skip

# Measurements in words that no row holds, by page: settings, goals, arithmetic, and figures of tests.
NOT_FIGURES: dict[str, tuple[str, ...]] = {
    "README.md": ("5 % supervised",),
    "docs/design.md": (
        "at most 8.5 GiB", "<= 8.5 GiB", "costs 2.7 times as much plus", "1.4 times as much. Masks",
        "peaks agree within 1 %", "whole where 2 GiB", "bf16 <= 0.60x", "<= 1.05x at r16", ">= 2x tokens/s",
    ),
    "docs/kernels.md": ("at most 1.7 times it",),
}  # fmt: skip


def filled(text: str) -> str:
    """A page with every figure as the rows have it.

    Raises:
        LookupError: a name that is not known, or no such row.
    """

    def fill(match: re.Match) -> str:
        name = match["name"]
        if name not in FIGURES:
            raise LookupError(f"expected a figure of bench.figures, got {name!r}")
        value = FIGURES[name]()
        value = f"\n{value}\n" if "\n" in value else value
        return f"<!--fig {name}-->{value}<!--/-->"

    return _FIGURE.sub(fill, text)


def loose(page: str, text: str) -> Iterator[tuple[int, str]]:
    """(line, measurement) of what looks like a figure outside of the comments and is not listed in `NOT_FIGURES`."""
    bare = _FIGURE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(bare.splitlines(), start=1):
        for match in _MEASUREMENT.finditer(line):
            if not any(words in line for words in NOT_FIGURES[page]):
                yield number, match[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a page is stale")
    check = parser.parse_args(arguments).check
    stale = []
    for page in PAGES:
        text = (ROOT / page).read_text()
        try:
            new = filled(text)
        except LookupError as error:
            print(f"error: {page}: {error.args[0]}", file=sys.stderr)
            return 2
        if new != text:
            stale.append(page)
            if not check:
                write_text(ROOT / page, new)
    print(f"{'stale' if check else 'rewritten'}: {', '.join(stale)}" if stale else "every figure is that of its row")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())

"""Correctness on the device itself: every kernel, op and fused model against float64, twice for the same bits.

Rows: {"check", "dtype", "provider", "rests", "ok", "error", "eager_error", ...}; `rests` names what may be chosen only
if the check passes: <provider>:<op of `dispatch.OPS`> and gemm:<way>.
"""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch

from bench.gpu import tuned
from bench.gpu.judge import cloned, same_bits, verdict, widened
from bench.gpu.kernel_cases import Case, call_case, kernel_cases, layout
from bench.gpu.op_cases import forward_and_gradients, op_cases
from bench.gpu.repository import ROOT
from bench.gpu.shapes import LinearCall
from mmpeft_fast import METHODS
from mmpeft_fast import provider as forced
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.ops import kernels_torch
from mmpeft_fast.ops.dispatch import OPS
from mmpeft_fast.ops.providers import why_not_installed

# (rows, depth, columns of the segments, rank): whole tiles of every candidate but for the last segment.
_GEMM_SIZES = (
    (1, 64, (64,), 16), (33, 136, (256, 512, 72), 16), (1000, 1032, (768, 256), 128),
    (1024, 4096, (4096, 4096, 4096), 16), (1024, 3584, (3584, 512, 512), 64), (1024, 11008, (4096,), 16),
)  # fmt: skip
# The second run of an op is recorded, the third runs from the tape (`ops.tape`).
_RUNS = 3
MODELS = tuple(f"{family} {method}" for family in ("llava", "qwen2_vl") for method in METHODS)


def items(provider: str, dtype: str, device: str, ways: Iterable[str] = (), few: int | None = None) -> list[dict]:
    """Arguments of `run`, one kind after another so that every kind has had some where time runs out.

    ways: of the GEMM that are checked beside the provider's kernels: layout, triton, gluon. few: of each kind.
    """
    names = {
        "model": MODELS,
        "kernel": [case.name for case in kernel_cases()],
        "op": [case.name for case in op_cases()],
        "gemm": [f"{way} {i}" for way in ways for i in range(len(_GEMM_SIZES))],
    }
    chosen = {kind: list(found)[:few] for kind, found in names.items()}
    longest = max(map(len, chosen.values()))
    return [
        {"kind": kind, "name": found[i], "dtype": dtype, "provider": provider, "device": device}
        for i in range(longest)
        for kind, found in chosen.items()
        if i < len(found)
    ]


def extension_items(device: str) -> list[dict]:
    """The extension's own tests, also under compute-sanitizer where there is one."""
    prefixes = ["", *(["compute-sanitizer "] if shutil.which("compute-sanitizer") else [])]
    common = {"dtype": "as the test says", "provider": "cuda", "device": device}
    return [{"kind": "extension", "name": f"{prefix}tests/csrc_cuda/test_kernels.py", **common} for prefix in prefixes]


def run(kind: str, name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    """Rows of one check."""
    common = {"check": f"{kind}: {name}", "dtype": dtype, "provider": provider}
    missing = why_not_installed(provider)  # asking loads the extension
    if missing is not None:
        yield {**common, "rests": _of(provider, OPS), "ok": False, "unfinished": True, "error": missing}
        return
    # Deterministic library kernels, so that what does not repeat is ours; it also fills new tensors with nan, so that
    # an output which a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tuned.forced():
            for row in _KINDS[kind](name, dtype, provider, device):
                yield {**common, **row}
    finally:
        torch.use_deterministic_algorithms(False)
        if device == "cuda":
            torch.cuda.empty_cache()  # other processes check on the same GPU


def _of(provider: str, ops: Iterable[str]) -> list[str]:
    return [f"{provider}:{op}" for op in ops]


def _named(cases, name: str):
    return next(case for case in cases if case.name == name)


def judged(
    got: Callable[[object], Mapping],
    definition: Callable[[object], Mapping],
    operands,
    *,
    must_repeat: bool = True,
    runs: int = 2,
) -> dict:
    """A verdict on `got`, which may overwrite its operands, and whether all `runs` have the same bits."""
    first = got(cloned(operands))
    row = verdict(first, definition(cloned(operands)), definition(widened(operands)))
    repeats = all(same_bits(first, got(cloned(operands))) for _ in range(runs - 1))
    return {**row, "repeats": repeats, "ok": row["ok"] and (repeats or not must_repeat)}


def _run(case: Case, kernels, operands: dict) -> dict:
    return case.run(kernels, **operands)


def judged_case(case: Case, kernels, operands: dict, runs: int = 2) -> dict:
    """A verdict on a case of the kernel set by a provider's module."""
    return judged(partial(_run, case, kernels), partial(_run, case, kernels_torch), operands, runs=runs)


def kernels_of(provider: str):
    return importlib.import_module(f"mmpeft_fast.ops.kernels_{provider}")


def _kernel(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    case = _named(kernel_cases(), name)
    row = judged_case(case, kernels_of(provider), case.operands(DTYPES[dtype], device))
    yield {"rests": _of(provider, case.ops), **row}


def _op(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    case = _named(op_cases(), name)

    def on_provider(operands):
        with forced(provider):
            return forward_and_gradients(case.op, operands)

    row = judged(
        on_provider,
        lambda operands: forward_and_gradients(case.ref, operands),
        case.operands(DTYPES[dtype], device),
        # The library's attention with a mask has no deterministic backward.
        must_repeat=case.ops != ("attention",),
        runs=_RUNS,
    )
    yield {"rests": _of(provider, case.ops), **row}


def _gemm(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    way, index = name.split()
    num_rows, depth, widths, rank = _GEMM_SIZES[int(index)]
    call = LinearCall("none", depth, widths)
    for direction in ("fwd", "dx") if way != "layout" else ("fwd",):
        case = call_case(f"lowrank_gemm {direction}", call, num_rows, rank, 0.0)
        operands = case.operands(DTYPES[dtype], device)
        got = partial(layout, list(widths)) if way == "layout" else partial(_run, case, kernels_of(provider))
        with tuned.forced(way=way):
            row = judged(got, partial(_run, case, kernels_torch), operands)
        yield {"check": f"gemm: {way} {case.name}", "rests": [f"gemm:{way}"], **row}


def _model(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    from bench.gpu import model_cases  # transformers and peft, which most processes do without

    yield {"rests": _of(provider, OPS), **model_cases.compare(name, DTYPES[dtype], provider, device)}


def _extension(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    """The tests of the extension's CUDA ops in a process of their own: a crash of theirs is one row."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "gpu",
        str(ROOT / name.split()[-1]),
    ]
    if name.startswith("compute-sanitizer"):
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *command, "--maxfail", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    row = {"ok": done.returncode == 0 and " passed" in last, "summary": last}
    yield {"rests": _of("cuda", OPS), **row, **({} if row["ok"] else {"reason": f"status {done.returncode}: {last}"})}


_KINDS = {
    "extension": _extension, "kernel": _kernel, "op": _op, "gemm": _gemm, "model": _model,
}  # fmt: skip

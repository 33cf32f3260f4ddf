"""Correctness on the device itself: every kernel, op and fused model against float64, twice for the same bits.

Rows: {"check", "dtype", "provider", "rests", "ok", "error", "eager_error", ...}; `rests` names what may be chosen only
if the check passes: <provider>:<op of `dispatch.OPS`> and gemm:<way>.
"""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from bench.gpu import gemms, tuned
from bench.gpu.judge import DTYPES, cloned, same_bits, verdict, widened
from bench.gpu.kernel_cases import Case, kernel_cases
from bench.gpu.op_cases import OpCase, forward_and_gradients, op_cases
from bench.gpu.repository import ROOT
from mmpeft_fast import provider as forced
from mmpeft_fast.ops import kernels_torch
from mmpeft_fast.ops.dispatch import OPS

_NO_TABLES = ROOT / "no tables"
# Races show by chance: this many runs of each tile have to agree.
_RACE_REPEATS = 40
# (rows, depth, columns of the segments, rank): whole tiles of every candidate but for the last segment.
_GEMM_SIZES = (
    (1, 64, (64,), 16), (33, 136, (256, 512, 72), 16), (1000, 1032, (768, 256), 128),
    (1024, 4096, (4096, 4096, 4096), 16), (1024, 3584, (3584, 512, 512), 64), (1024, 11008, (4096,), 16),
)  # fmt: skip
_RACE_TILES = [
    {"block_m": block_m, "block_n": block_n, "num_warps": num_warps, "num_stages": 1}
    for block_m, block_n, num_warps in (
        (16, 64, 4), (16, 128, 8), (32, 64, 4), (32, 64, 8), (64, 64, 8), (16, 256, 8), (32, 128, 4), (16, 64, 16),
    )
]  # fmt: skip
# What the kernels' own tests speak for, where that is not the linear calls.
_OPS_OF_FILE = {
    "rotary": ("attention",), "prefix": ("attention",), "cross_entropy": ("linear_cross_entropy",),
    "reduction": OPS, "dropout": ("fused_linear",),
}  # fmt: skip
# The CUDA provider hands float32 to another one.
_NOT_TAKEN = {("cuda", "fp32")}
_LOSS_TILES = [
    {"block_m": 1, "block_n": block_n, "num_warps": num_warps}
    for block_n, num_warps in ((128, 1), (256, 4), (1024, 4), (1024, 32), (4096, 8), (4096, 16), (16384, 16))
]


def items(providers: list[str], ways: list[str], device: str) -> list[dict]:
    """Everything there is to check, the most telling first; keyword arguments of `run`.

    ways: of the GEMM that the device can run, besides the library's: layout, triton, gluon.
    """
    from bench.gpu import model_cases  # transformers and peft, which most processes do without

    found = [_item("model", name, "bf16", each, device) for name in model_cases.NAMES for each in providers]
    last = []
    for dtype in ("bf16", "fp32", "fp16"):
        for name in providers:
            if name != "torch" and (name, dtype) not in _NOT_TAKEN:
                found += [_item("kernel", case.name, dtype, name, device) for case in kernel_cases()]
            if (name, dtype) not in _NOT_TAKEN:
                found += [_item("op", case.name, dtype, name, device) for case in op_cases()]
        for way in ways if dtype != "fp32" else ():
            # A warp-specialised kernel that is wrong may hang: that must not keep the others waiting.
            of_way = [_item("gemm", f"{way} {i}", dtype, "triton", device) for i in range(len(_GEMM_SIZES))]
            (last if way == "gluon" else found).extend(of_way)
    if "triton" in providers:
        for i in range(len(_RACE_TILES)):
            found += [_item("race", f"{kernel} {i}", "bf16", "triton", device) for kernel in ("branch", "plain")]
        found += [_item("race", f"loss {i}", "bf16", "triton", device) for i in range(len(_LOSS_TILES))]
    return found + last


def test_files() -> list[dict]:
    """The kernels' own tests, made for the interpreter, on the device; keyword arguments of `run`.

    Files that test more than a kernel take inputs from generators of the CPU: `op_cases` stand in for them.
    """
    folder, kernels = ROOT / "tests" / "kernels", ROOT / "kernels" / "mmpeft_kernels"
    files = sorted((folder / "interpreted").glob("check_*.py"))
    files = [path for path in files if (kernels / path.name.removeprefix("check_")).exists()]
    gluon = [path for path in [folder / "test_lowrank_gemm_gluon.py"] if path.exists()]
    return [
        _item("tests", path.relative_to(ROOT).as_posix(), "as the test says", "triton", "cuda")
        for path in files + gluon
    ]


def extension_tests() -> list[dict]:
    """The CUDA kernels' own tests, also under compute-sanitizer where there is one; keyword arguments of `run`."""
    names = ["tests/csrc_cuda/test_kernels.py"]
    if shutil.which("compute-sanitizer"):
        names.append(f"compute-sanitizer {names[0]}")
    return [_item("extension", name, "as the test says", "cuda", "cuda") for name in names]


def _item(kind: str, name: str, dtype: str, provider: str, device: str) -> dict:
    return {"kind": kind, "name": name, "dtype": dtype, "provider": provider, "device": device}


def run(kind: str, name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    """Rows of one check."""
    common = {"check": f"{kind}: {name}", "dtype": dtype, "provider": provider}
    # Deterministic library kernels, so that what does not repeat is ours; it also fills new tensors with nan, so that
    # an output which a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with tuned.installed(_NO_TABLES):  # the kernels with their defaults, whatever a table prefers to them
            for row in _KINDS[kind](name, dtype, provider, device):
                yield {**common, **row}
    finally:
        torch.use_deterministic_algorithms(False)
        if device == "cuda":
            torch.cuda.empty_cache()  # other processes check on the same GPU


def _of(provider: str, ops: Iterable[str]) -> list[str]:
    return [f"{provider}:{op}" for op in ops]


def _named(cases, name: str) -> Case | OpCase:
    return next(case for case in cases if case.name == name)


def _judged(
    got: Callable[[object], Mapping], definition: Callable[[object], Mapping], operands, *, must_repeat: bool = True
) -> dict:
    """A verdict on `got`, which may overwrite its operands, and whether it repeats bit by bit."""
    first, second = got(cloned(operands)), got(cloned(operands))
    row = verdict(first, definition(cloned(operands)), definition(widened(operands)))
    repeats = same_bits(first, second)
    return {**row, "repeats": repeats, "ok": row["ok"] and (repeats or not must_repeat)}


def _kernel(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    case = _named(kernel_cases(), name)
    kernels = importlib.import_module(f"mmpeft_fast.ops.kernels_{provider}")
    row = _judged(
        lambda operands: case.run(kernels, **operands),
        lambda operands: case.run(kernels_torch, **operands),
        case.operands(DTYPES[dtype], device),
    )
    yield {"rests": _of(provider, case.ops), **row}


def _op(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    case = _named(op_cases(), name)

    def on_provider(operands):
        with forced(provider):
            return forward_and_gradients(case.op, operands)

    row = _judged(
        on_provider,
        lambda operands: forward_and_gradients(case.ref, operands),
        case.operands(DTYPES[dtype], device),
        # The library's attention with a mask has no deterministic backward.
        must_repeat=case.ops != ("attention",),
    )
    yield {"rests": _of(provider, case.ops), **row}


def _gemm(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    way, index = name.split()
    num_rows, depth, num_outs, rank = _GEMM_SIZES[int(index)]
    dtype = DTYPES[dtype]
    forward = gemms.forward_operands(num_rows, depth, num_outs, rank, dtype=dtype, device=device)
    backward = gemms.dx_operands(num_rows, sum(num_outs), depth, dtype=dtype, device=device)
    for direction, operands in (("fwd", forward), ("dx", backward)):
        if way == "layout" and direction == "dx":
            continue
        row = _judged(
            lambda operands: {
                "y": gemms.layout(operands) if way == "layout" else gemms.launched(way, operands, None)()
            },
            lambda operands: {"y": gemms.composite(operands)},
            operands,
        )
        sizes = f"{num_rows}x{depth}x{list(num_outs)} r{rank}"
        yield {"check": f"gemm: {way} {direction} {sizes}", "rests": [f"gemm:{way}"], **row}


def _race(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    """Kernels whose threads read back what others of the program wrote, many times over many tiles."""
    what, index = name.split()
    if what == "loss":
        case, fields = _named(kernel_cases(), "cross_entropy 33x32064"), _LOSS_TILES[int(index)]
        operands, ops = case.operands(DTYPES[dtype], device), ["linear_cross_entropy"]
        definition = lambda operands: case.run(kernels_torch, **operands)  # noqa: E731
        got = lambda operands: _loss_with(fields, **operands)  # noqa: E731
    else:
        from bench.gpu.tunables import TUNABLES, Problem

        kernel, fields, ops = TUNABLES["prologue_backward"], _RACE_TILES[int(index)], ["fused_linear", "rms_norm"]
        problem = Problem("llama-7b", "qkv", 520, 16 if what == "branch" else 0)
        operands = kernel.operands(problem, DTYPES[dtype], device)
        definition = lambda operands: _by_name(kernel.torch(operands))  # noqa: E731
        got = lambda operands: _by_name(kernel.launch(operands, fields))  # noqa: E731
    row = _judged(got, definition, operands)
    first = got(cloned(operands))
    differing = sum(not same_bits(first, got(cloned(operands))) for _ in range(_RACE_REPEATS))
    row |= {"ok": row["ok"] and differing == 0, "runs": _RACE_REPEATS, "differing_runs": differing}
    yield {"rests": _of("triton", ops), **row, "tile": fields}


def _by_name(outputs) -> dict:
    return {str(i): part for i, part in enumerate(outputs)}


def _loss_with(fields: dict, *, logits, labels, count) -> dict:
    from mmpeft_kernels.cross_entropy import cross_entropy_
    from mmpeft_kernels.tile import Tile

    loss = cross_entropy_(logits, labels, count, tile=Tile(**fields))
    return {"loss": loss, "dlogits": logits}


def _model(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    from bench.gpu import model_cases

    yield {"rests": _of(provider, OPS), **model_cases.compare(name, DTYPES[dtype], provider, device)}


def _tests(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    """Every test of a file with tensors on `device` wherever the test does not say where."""
    import pytest

    class Recorder:
        def __init__(self):
            self.rows: list[dict] = []

        def pytest_runtest_logreport(self, report):
            if report.failed or (report.when == "call" and not report.skipped):
                self.rows.append({"check": f"tests: {report.nodeid}", "ok": report.passed, **_reason(report)})

        def pytest_collectreport(self, report):
            if report.failed:
                self.rows.append({"check": f"tests: {report.nodeid}", "ok": False, **_reason(report)})

    recorder = Recorder()
    torch.set_default_device(device)
    try:
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
        pytest.main([*options, str(ROOT / name)], plugins=[recorder])
    finally:
        torch.set_default_device(None)
    kernel = Path(name).stem.removeprefix("check_")
    rests = ["gemm:gluon"] if "gluon" in name else _of("triton", _OPS_OF_FILE.get(kernel, ("fused_linear", "rms_norm")))
    for row in recorder.rows:
        yield {"rests": rests, **row}


def _extension(name: str, dtype: str, provider: str, device: str) -> Iterator[dict]:
    """The tests of the extension's CUDA ops in a process of their own: their tensors come from the CPU."""
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


def _reason(report) -> dict[str, str]:
    if report.passed:
        return {}
    crash = getattr(report.longrepr, "reprcrash", None)
    return {"reason": (crash.message if crash else str(report.longrepr)).strip().splitlines()[0]}


_KINDS = {
    "extension": _extension, "kernel": _kernel, "op": _op, "gemm": _gemm, "race": _race, "model": _model,
    "tests": _tests,
}  # fmt: skip

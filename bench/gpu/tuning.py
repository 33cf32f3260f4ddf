"""Tiles and ways by measurement: the Triton kernel set at the linear calls of a decoder layer, as whole steps run it.

`compile_call` compiles what a step runs, `try_tile` compiles and judges a candidate, both in several processes at once;
`time_tiles` runs alone on the machine. Adapters are float32 over a bf16 base, `add_peft`'s default.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu import tuned
from bench.gpu.checks import judged_case, kernels_of
from bench.gpu.judge import mapped
from bench.gpu.kernel_cases import Case, call_case, dx_in_two_passes, wide
from bench.gpu.shapes import DIMS, LinearCall, Scope, linear_calls
from bench.gpu.timing import device_of, timed
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.ops import kernels_torch
from mmpeft_fast.ops.providers import why_not_installed

Fields = dict[str, int]
# Rows of a trial: what compiles depends on them only by their divisibility, and the float64 truth is cheap.
_TRIAL_ROWS = 512
_SECONDS_A_PROBLEM = 2.0
# Races of threads that read back what others wrote show by chance: so many runs of a tile have to agree.
_RUNS = 20
# Registers of a multiprocessor that a block's float32 accumulators may take: half of 65536, the rest is for operands.
_ACCUMULATOR_VALUES = 32768


class Problem(NamedTuple):
    """A linear call of a decoder layer with `m` rows, branches of rank `r` and dropout `p`; JSON-able."""

    dims: str
    call: str
    m: int
    r: int
    p: float = 0.05

    @property
    def linear(self) -> LinearCall:
        return linear_calls(DIMS[self.dims])[self.call]


def _rows(blocks, warps, stages, fits: Callable[[int, int], bool] = lambda m, n: True) -> list[Fields]:
    return [
        {"block_m": m, "block_n": n, "num_warps": num_warps, "num_stages": num_stages}
        for (m, n), num_warps, num_stages in product(blocks, warps, stages)
        if fits(m, n)
    ]


def _shrink(r: int, rank: int) -> list[Fields]:
    blocks = ((64, 64), (64, 128), (128, 64), (32, 128))
    return _rows(blocks, (4, 8), (3, 4), lambda m, n: m * min(max(rank, 16), 256) <= _ACCUMULATOR_VALUES)


def _ddown(r: int, rank: int) -> list[Fields]:
    blocks = ((64, 64), (32, 256), (64, 128), (32, 64), (32, 128))
    return _rows(blocks, (4, 8), (2,), lambda m, n: n * min(max(rank, 16), 128) <= _ACCUMULATOR_VALUES)


def _dy_pass(r: int, rank: int) -> list[Fields]:
    blocks = ((64, 128), (128, 256), (64, 256), (128, 128), (64, 64), (32, 128))
    return _rows(blocks, (8,), (3, 2), lambda m, n: (m + n) * min(max(r, 16), 128) <= _ACCUMULATOR_VALUES)


def _with_k(tiles: Sequence[Fields], block_k: int = 64) -> list[Fields]:
    return [{**tile, "block_k": block_k, "use_tma": True} for tile in tiles]


def _gemm(r: int, rank: int) -> list[Fields]:
    """A warpgroup's share of the accumulator: 64 x 256 values are 128 registers a thread."""
    return _with_k(_rows(((128, 256), (256, 128)), (8,), (3,)) + _rows(((128, 128), (64, 256)), (4,), (4,)))


def _gluon(r: int, rank: int) -> list[Fields]:
    """Two warpgroups multiply, the result waits in shared memory."""
    return _with_k(_rows(((128, 128),), (8,), (5,)) + _rows(((256, 128),), (8,), (3,)))


# Names are the keys of the table's tiles (Gluon's are kept under the plain GEMM's) with the sizes that their buckets
# are made of and candidates beside the default; those that took most of a step come first.
KERNELS: dict[str, tuple[str, Callable[[int, int], list[Fields]]]] = {
    "masked_dx": ("mnkR", _gemm),
    "shrink": ("mkR", _shrink),
    "dy_pass": ("mnr", _dy_pass),
    "ddown": ("mkR", _ddown),
    "lowrank_gemm fwd": ("mnkr", _gemm),
    "lowrank_gemm dx": ("mnkr", _gemm),
    "lowrank_gemm_gluon fwd": ("mnkr", _gluon),
    "lowrank_gemm_gluon dx": ("mnkr", _gluon),
}


def sizes(kernel: str, problem: Problem) -> dict[str, int]:
    """What `dispatch.tile_fields` is called with."""
    call, is_dx = problem.linear, kernel.endswith("dx")
    inside, outside = (sum(call.num_outs), call.width) if is_dx else (call.width, sum(call.num_outs))
    values = {
        "m": problem.m, "n": outside, "k": inside, "r": 0 if is_dx else problem.r, "R": problem.r * len(call.num_outs)
    }  # fmt: skip
    return {name.lower(): values[name] for name in KERNELS[kernel][0]}


def tiles(kernel: str, problem: Problem) -> list[Fields | None]:
    """None, the kernel's own default, and the candidates beside it."""
    return [None, *KERNELS[kernel][1](problem.r, problem.r * len(problem.linear.num_outs))]


def problems(scope: Scope) -> list[tuple[str, Problem]]:
    """(kernel, problem): what is tuned, the settings of whole steps first."""
    return [
        (kernel, Problem(dims, call, m, r, p))
        for dims, r, m, p in scope.problems
        for kernel in KERNELS
        if p or kernel != "masked_dx"
        for call in linear_calls(DIMS[dims])
    ]


def _named(kernel: str) -> tuple[str, str]:
    """(the table's name, the way of the GEMM)"""
    return kernel.replace("_gluon", ""), "gluon" if "gluon" in kernel else "triton"


def _case(kernel: str, problem: Problem, dtype: str, device: str) -> tuple[Case, dict]:
    case = call_case(_named(kernel)[0], problem.linear, problem.m, problem.r, problem.p)
    adapters = torch.float32 if dtype == "bf16" else DTYPES[dtype]
    return case, case.operands(DTYPES[dtype], device, adapters)


def compile_call(kernel: str, problem: list, dtype: str, device: str) -> Iterator[dict]:
    """Compiles, by running it, what a whole step runs for this call: with the tile and the way that its table says."""
    case, operands = _case(kernel, Problem(*problem), dtype, device)
    started = time.monotonic()
    case.run(kernels_of("triton"), **operands)
    if device == "cuda":
        torch.cuda.synchronize()
    yield {"check": f"compiles: {case.name}", "seconds": time.monotonic() - started}


def try_tile(kernel: str, problem: list, tile: Fields | None, dtype: str, device: str) -> Iterator[dict]:
    """One row: whether the tile compiles, is right and repeats."""
    shape = Problem(*problem)
    case, operands = _case(kernel, shape._replace(m=min(shape.m, _TRIAL_ROWS)), dtype, device)
    name, way = _named(kernel)
    with tuned.forced(name, tile, way):
        row = judged_case(case, kernels_of("triton"), operands, _RUNS if device == "cuda" else 2)
    yield {"kernel": kernel, "problem": problem, "tile": tile, **row}


def time_tiles(kernel: str, problem: list, tiles: list, dtype: str, device: str) -> Iterator[dict]:
    """A row for every tile, timed in turn with what could run instead: the library's GEMMs ("torch") where they are an
    answer, the extension's kernel ("cuda"), and for GEMMs the bare product and (forward) the layout way."""
    shape = Problem(*problem)
    case, operands = _case(kernel, shape, dtype, device)
    name, way = _named(kernel)

    def run(tile):
        set_tile(tile)
        return case.run(kernels_of("triton"), **operands)

    functions: dict[str, Callable] = {str(i): lambda tile=tile: run(tile) for i, tile in enumerate(tiles)}
    if kernel == "masked_dx":
        functions["torch"] = lambda: dx_in_two_passes(kernels_of("triton"), p=shape.p, **operands)
    elif "gemm" in kernel or kernel == "dy_pass":
        functions["torch"] = lambda: case.run(kernels_torch, **operands)
    if kernel != "masked_dx" and device == "cuda" and why_not_installed("cuda") is None:
        functions["cuda"] = lambda: case.run(kernels_of("cuda"), **operands)
    if kernel.endswith(" fwd"):
        x, weight = wide(list(shape.linear.num_outs), operands)
        functions |= {
            "bare": lambda: operands["x"] @ operands["weight"].t(), "layout": lambda: x @ weight.t()
        }  # fmt: skip
    if kernel.endswith("dx"):
        functions["bare"] = lambda: operands["dy"] @ operands["weight"]
    with tuned.forced(name, None, way) as set_tile:
        measured = timed(functions, device_of(device), seconds=_SECONDS_A_PROBLEM)
    is_gemm = "gemm" in kernel or kernel == "masked_dx"
    work = _work(kernel, shape, operands, {} if is_gemm else case.run(kernels_torch, **operands))
    common = {"kernel": kernel, "dtype": dtype, **shape._asdict(), "sizes": sizes(kernel, shape)}
    for which, times in measured.items():
        row = {**common, "tile": tiles[int(which)] if which.isdigit() else which, **times.row()}
        yield row | {unit: amount / row["p50_ms"] / 1e6 for unit, amount in work.items()}


def _work(kernel: str, problem: Problem, operands: dict, outputs: dict) -> dict[str, float]:
    """GFLOP of a GEMM, which has no `outputs`, without its low-rank part; else the bytes that any way of doing it has
    to move: operands read once, results written once."""
    if not outputs:
        return {"gflop_s": 2 * problem.m * problem.linear.width * sum(problem.linear.num_outs)}
    found: list[Tensor] = []
    unread = {"shrink": ("da", "dh", "dresidual"), "ddown": ("dh", "dresidual")}.get(kernel, ())
    mapped([{name: part for name, part in operands.items() if name not in unread}, outputs], found.append)
    return {"gb_s": sum(tensor.numel() * tensor.element_size() for tensor in found)}

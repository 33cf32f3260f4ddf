"""Tiles by measurement: every candidate compiled, checked and looked at for spills, then timed in turn with the rest.

`try_tile` runs in several processes at once, because compiling is what it takes; `time_tiles` alone on the machine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from bench.gpu import gemms
from bench.gpu.judge import DTYPES, cloned, mapped, verdict, widened
from bench.gpu.shapes import DIMS, RANKS, TOKENS, linear_calls
from bench.gpu.timing import interleaved_ms
from bench.gpu.tunables import TUNABLES, Problem
from bench.rows import quantiles

# Rows of a trial: what compiles does not depend on them, and the float64 truth is cheap.
_TRIAL_ROWS = 512
_SECONDS_A_PROBLEM = 2.0
# The operands that a kernel reads.
_READS = {
    "prologue": ("x", "gain", "down"),
    "prologue_backward": ("dh", "x", "gain", "down", "da"),
    "dy_pass": ("dy", "a", "up"),
    "ddown": ("da", "x", "gain"),
}


def problems(kernel: str) -> list[Problem]:
    """What a kernel is tuned for, the most common first."""
    found = []
    # Without branches: what IA3, prefix-tuning and LayerNorm-tuning run.
    ranks = (*RANKS, 0) if kernel in ("prologue", "prologue_backward") else RANKS
    for r in ranks:
        for m in TOKENS:
            for dims in ("llama-7b", "qwen2.5-7b"):
                found += [Problem(dims, call, m, r) for call in linear_calls(DIMS[dims])]
    if kernel.endswith(" dx"):  # no ranks in it
        found = [problem for problem in found if problem.r == RANKS[0]]
    return found


def compile_key(kernel: str, problem: Problem) -> str:
    """Problems with equal keys run the same compiled kernels, so one trial of a tile stands for all of them."""
    if kernel.endswith(" dx"):
        return "any"
    if kernel.startswith("lowrank_gemm") or kernel == "dy_pass":
        return f"{'several segments' if len(problem.linear.num_outs) > 1 else 'one segment'} r{problem.r}"
    return f"{problem.linear.prologue} r{problem.rank}"


def good_tiles(trial_rows: Sequence[dict], kernel: str, problem: Problem) -> list[dict | None]:
    """The candidates of a problem that compiled, were right and did not spill."""
    key = compile_key(kernel, problem)
    return [row["tile"] for row in trial_rows if row["kernel"] == kernel and row.get("key") == key and row["ok"]]


def trials(kernel: str) -> list[dict]:
    """Keyword arguments of `try_tile` for every candidate of a kernel, once for each way it is compiled."""
    found: dict[str, list[dict]] = {}
    for problem in problems(kernel):
        key = compile_key(kernel, problem)
        if key not in found:
            trial = list(problem._replace(m=_TRIAL_ROWS))
            found[key] = [
                {"kernel": kernel, "problem": trial, "tile": tile} for tile in TUNABLES[kernel].candidates(problem)
            ]
    return [trial for trials_of_key in found.values() for trial in trials_of_key]


@contextmanager
def _compiled_kernels(found: list) -> Iterator[None]:
    """Collects the compiled kernel of every launch inside."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def collecting(kernel, *args, **kwargs):
        compiled = run(kernel, *args, **kwargs)
        found.append(compiled)
        return compiled

    JITFunction.run = collecting
    try:
        yield
    finally:
        JITFunction.run = run


def try_tile(kernel: str, problem: list, tile: dict | None, dtype: str, device: str) -> Iterator[dict]:
    """One row: whether the tile compiles, is right and does not spill."""
    tunable, shape = TUNABLES[kernel], Problem(*problem)
    operands = tunable.operands(shape, DTYPES[dtype], device)
    compiled: list = []
    with _compiled_kernels(compiled):
        got = tunable.launch(cloned(operands), tile)
    named = ({str(i): part for i, part in enumerate(outputs)} for outputs in (
        got, tunable.torch(cloned(operands)), tunable.torch(widened(operands))
    ))  # fmt: skip
    row = verdict(*named)
    spills = max((getattr(each, "n_spills", 0) or 0 for each in compiled), default=0)
    row |= {"spills": spills, "registers": max((getattr(each, "n_regs", 0) or 0 for each in compiled), default=0)}
    key = compile_key(kernel, shape)
    yield {"kernel": kernel, "key": key, "tile": tile, **row, "ok": row["ok"] and spills == 0}


def time_tiles(kernel: str, problem: list, tiles: list, dtype: str, device: str) -> Iterator[dict]:
    """A row for every tile and for the torch provider (tile "torch"), timed in turn on one problem.

    GEMMs also get rows for the library's ways, bare and (forward) layout, and for the extension's kernel, cuda.
    """
    tunable, shape = TUNABLES[kernel], Problem(*problem)
    operands = tunable.operands(shape, DTYPES[dtype], device)
    functions = {str(i): (lambda tile=tile: tunable.launch(operands, tile)) for i, tile in enumerate(tiles)}
    functions["torch"] = lambda: tunable.torch(operands)
    is_gemm = isinstance(operands, gemms.Operands)
    if is_gemm:
        functions["bare"] = lambda: gemms.bare(operands)
        if operands.x_wide is not None:
            functions["layout"] = lambda: gemms.layout(operands)
        if gemms.runs_on_cuda(operands):
            functions["cuda"] = lambda: gemms.on_cuda(operands)
    times = interleaved_ms(functions, device=device, rounds=7, seconds=_SECONDS_A_PROBLEM)
    num_bytes = None if is_gemm else _least_bytes(kernel, operands, tunable.torch(cloned(operands)))
    common = {"kernel": kernel, "dtype": dtype, **shape._asdict(), "sizes": tunable.sizes(shape)}
    for name, values in times.items():
        row = {**common, "tile": tiles[int(name)] if name.isdigit() else name, **quantiles(values)}
        if is_gemm:
            row["tflops"] = gemms.num_flops(operands) / row["p50_ms"] / 1e9
        else:
            row["gb_s"] = num_bytes / row["p50_ms"] / 1e6
        yield row


def _least_bytes(kernel: str, operands: dict, outputs: tuple) -> int:
    """What any way of doing it has to move: operands read once, results written once."""
    found: list[Tensor] = []
    mapped([[operands[name] for name in _READS[kernel]], list(outputs)], lambda tensor: found.append(tensor) or tensor)
    return sum(tensor.numel() * tensor.element_size() for tensor in found)

"""The kernels whose tiles are tuned: operands at a layer's sizes, a launch with a tile, and torch's way of the same."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu import gemms, tiles
from bench.gpu.shapes import DIMS, LinearCall, linear_calls
from mmpeft_fast.ops import kernels_torch
from mmpeft_fast.ops.kernel_set import LowRank, Mask, PrologueSpec
from mmpeft_fast.ops.norms import rms_norm_forward

_EPS, _DROPOUT, _STREAM = 1e-6, 0.05, 2


class Problem(NamedTuple):
    """A linear call of a decoder layer with `m` rows and branches of rank `r`; JSON-able."""

    dims: str
    call: str
    m: int
    r: int

    @property
    def linear(self) -> LinearCall:
        return linear_calls(DIMS[self.dims])[self.call]

    @property
    def rank(self) -> int:
        """Of all branches that share the input."""
        return self.r * len(self.linear.num_outs)

    @property
    def num_out(self) -> int:
        return sum(self.linear.num_outs)


Outputs = tuple[Tensor | None, ...]


class Tunable(NamedTuple):
    """sizes: what the table's bucket is made of, by name; candidates: fields of the tile.

    operands: (problem, dtype, device) -> tensors and numbers. launch: (operands, tile's fields) -> outputs, and torch
    the same by the torch provider; both may overwrite operands.
    """

    sizes: Callable[[Problem], dict[str, int]]
    candidates: Callable[[Problem], list[tiles.Fields]]
    operands: Callable[..., object]
    launch: Callable[[object, tiles.Fields], Outputs]
    torch: Callable[[object], Outputs]


def _tile(fields: tiles.Fields):
    from mmpeft_kernels.tile import Tile

    return None if fields is None else Tile(**fields)


def _mask(operands: dict) -> dict:
    return {"p": _DROPOUT, "seed": operands["seed"], "stream": _STREAM}


def _spec(operands: dict) -> PrologueSpec:
    return PrologueSpec(operands["name"], operands["gain"], _EPS, None)


def _low_rank(operands: dict) -> LowRank:
    return LowRank(operands["down"], Mask(_DROPOUT, _STREAM, operands["seed"]))


def _prologue_operands(problem: Problem, dtype: torch.dtype, device: str) -> dict:
    """x, its prologue, and the stacked down projections with da and dh [M, K]."""
    torch.manual_seed(0)
    options, call = {"dtype": dtype, "device": device}, problem.linear
    num_inputs = 2 if call.prologue == "swiglu" else 1
    x = torch.randn(problem.m, num_inputs * call.width, **options).split(call.width, dim=1)
    gain = torch.rand(call.width, **options) + 0.5 if call.prologue == "rms_norm" else None
    rank = problem.rank
    return {
        "name": call.prologue,
        "x": x,
        "gain": gain,
        "rstd": None if gain is None else rms_norm_forward(x[0], gain, _EPS)[1],
        "down": torch.randn(rank, call.width, **options) * call.width**-0.5 if rank else None,
        "da": torch.randn(problem.m, rank, **options) if rank else None,
        "dh": torch.randn(problem.m, call.width, **options),
        "seed": torch.tensor(0x0123_4567_89AB_CDEF, device=device),
    }


def _launch_prologue(operands: dict, fields: tiles.Fields) -> Outputs:
    from mmpeft_kernels.prologue import prologue

    low_rank = {} if operands["down"] is None else {"down": operands["down"], **_mask(operands)}
    h, _, a, _ = prologue(
        *operands["x"], name=operands["name"], gain=operands["gain"], eps=_EPS, tile=_tile(fields), **low_rank
    )
    return h, a


def _torch_prologue(operands: dict) -> Outputs:
    low_rank = None if operands["down"] is None else _low_rank(operands)
    h, _, a = kernels_torch.prologue(_spec(operands), operands["x"], low_rank)
    return h, a


def _flat_rstd(operands: dict):
    return None if operands["rstd"] is None else operands["rstd"].view(-1)


def _launch_prologue_backward(operands: dict, fields: tiles.Fields) -> Outputs:
    from mmpeft_kernels.prologue_backward import prologue_backward

    low_rank = {} if operands["down"] is None else {"da": operands["da"], "down": operands["down"], **_mask(operands)}
    grads = prologue_backward(
        operands["dh"], *operands["x"], name=operands["name"], gain=operands["gain"], rstd=_flat_rstd(operands),
        tile=_tile(fields), **low_rank,
    )  # fmt: skip
    return grads.dx, grads.dup


def _torch_prologue_backward(operands: dict) -> Outputs:
    low_rank = [] if operands["down"] is None else [(_low_rank(operands), operands["da"])]
    grads = kernels_torch.prologue_backward(
        _spec(operands), operands["dh"], operands["x"], operands["rstd"], low_rank=low_rank,
        ddown_wanted=[False] * len(low_rank), need_dx=(True,) * len(operands["x"]),
    )  # fmt: skip
    return (*grads.dx, None)[:2]


def _launch_ddown(operands: dict, fields: tiles.Fields) -> Outputs:
    from mmpeft_kernels.ddown import ddown

    got = ddown(
        operands["da"], *operands["x"], out_dtype=operands["down"].dtype, name=operands["name"],
        gain=operands["gain"], rstd=_flat_rstd(operands), tile=_tile(fields), **_mask(operands),
    )  # fmt: skip
    return (got,)


def _torch_ddown(operands: dict) -> Outputs:
    grads = kernels_torch.prologue_backward(
        _spec(operands), None, operands["x"], operands["rstd"], low_rank=[(_low_rank(operands), operands["da"])],
        ddown_wanted=[True], need_dx=(False,) * len(operands["x"]),
    )  # fmt: skip
    return (grads.ddowns[0],)


def _dy_operands(problem: Problem, dtype: torch.dtype, device: str) -> dict:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    return {
        "dy": torch.randn(problem.m, problem.num_out, **options),
        "a": torch.randn(problem.m, problem.rank, **options),
        "up": torch.randn(problem.num_out, problem.r, **options) * problem.r**-0.5,
        "num_outs": problem.linear.num_outs,
    }


def _launch_dy_pass(operands: dict, fields: tiles.Fields) -> Outputs:
    from mmpeft_kernels.dy_pass import dy_pass
    from mmpeft_kernels.segments import SegmentShape

    rank = operands["up"].shape[1]
    segments = [SegmentShape(num_out, rank) for num_out in operands["num_outs"]]
    return dy_pass(operands["dy"], operands["a"], operands["up"], segments=segments, scaling=2.0, tile=_tile(fields))


def _torch_dy_pass(operands: dict) -> Outputs:
    widths, rank = list(operands["num_outs"]), operands["up"].shape[1]
    count = len(widths)
    das, dups = kernels_torch.dy_pass(
        operands["dy"].split(widths, dim=1), operands["a"].split(rank, dim=1), operands["up"].split(widths),
        scalings=[2.0] * count, activations=["identity"] * count, need_da=[True] * count, need_dup=[True] * count,
    )  # fmt: skip
    return torch.cat(das, dim=1), torch.cat(dups)


def _forward_operands(problem: Problem, dtype: torch.dtype, device: str) -> gemms.Operands:
    call = problem.linear
    return gemms.forward_operands(problem.m, call.width, call.num_outs, problem.r, dtype=dtype, device=device)


def _dx_operands(problem: Problem, dtype: torch.dtype, device: str) -> gemms.Operands:
    return gemms.dx_operands(problem.m, problem.num_out, problem.linear.width, dtype=dtype, device=device)


def _launch_gemm(way: str):
    def launch(operands: gemms.Operands, fields: tiles.Fields) -> Outputs:
        from mmpeft_kernels.lowrank_gemm import GemmTile

        return (gemms.launched(way, operands, None if fields is None else GemmTile(**fields))(),)

    return launch


def _gemm(way: str, candidates, *, forward: bool) -> Tunable:
    def sizes(problem: Problem) -> dict[str, int]:
        call = problem.linear
        if forward:
            return {"m": problem.m, "n": problem.num_out, "k": call.width, "r": problem.r}
        return {"m": problem.m, "n": call.width, "k": problem.num_out, "r": 0}

    operands = _forward_operands if forward else _dx_operands
    return Tunable(
        sizes, lambda problem: candidates(), operands, _launch_gemm(way), lambda operands: (gemms.composite(operands),)
    )


def _rows(candidates, operands, launch, in_torch, *names: str) -> Tunable:
    def sizes(problem: Problem) -> dict[str, int]:
        everything = {"m": problem.m, "n": problem.num_out, "k": problem.linear.width, "r": problem.rank}
        everything |= {"r": problem.r} if "n" in names else {}
        return {name: everything[name] for name in names}

    return Tunable(sizes, candidates, operands, launch, in_torch)


# The names are the keys of the table's tiles (Gluon's are kept under the plain GEMM's), their sizes what
# `dispatch.tile_fields` is called with.
TUNABLES: dict[str, Tunable] = {
    "lowrank_gemm fwd": _gemm("triton", tiles.gemm_candidates, forward=True),
    "lowrank_gemm dx": _gemm("triton", tiles.gemm_candidates, forward=False),
    "lowrank_gemm_gluon fwd": _gemm("gluon", tiles.gluon_candidates, forward=True),
    "lowrank_gemm_gluon dx": _gemm("gluon", tiles.gluon_candidates, forward=False),
    "prologue": _rows(
        lambda problem: tiles.prologue_candidates(problem.rank), _prologue_operands, _launch_prologue, _torch_prologue,
        "m", "k", "r",
    ),
    "prologue_backward": _rows(
        lambda problem: tiles.prologue_backward_candidates(problem.rank), _prologue_operands,
        _launch_prologue_backward, _torch_prologue_backward, "m", "k", "r",
    ),
    "dy_pass": _rows(
        lambda problem: tiles.dy_pass_candidates(problem.r), _dy_operands, _launch_dy_pass, _torch_dy_pass,
        "m", "n", "r",
    ),
    "ddown": _rows(
        lambda problem: tiles.ddown_candidates(problem.rank), _prologue_operands, _launch_ddown, _torch_ddown,
        "m", "k", "r",
    ),
}  # fmt: skip

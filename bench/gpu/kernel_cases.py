"""Cases of the kernel set: what goes into each of its functions, and what comes out, by name.

The function of the torch provider is the definition: in float64 it is the truth, in the case's dtype the yardstick.
Checks take them at ragged and at real sizes; the tuner and the compile section at the sizes of whole steps.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.shapes import DIMS, LinearCall, linear_calls
from mmpeft_fast.ops.kernel_set import LowRank, Mask, PrologueSpec, Term
from mmpeft_fast.ops.norms import rms_norm_forward

_EPS, _SCALING = 1e-5, 1.7
# Of the functions that linear calls run; the others are checked as parts of whole ops.
KERNELS = (
    "prologue", "prologue_backward", "shrink", "ddown", "dy_pass", "lowrank_gemm fwd", "lowrank_gemm dx", "masked_dx",
)  # fmt: skip
_LARGE = (("llama-7b", 520, 128), ("qwen2.5-7b", 1024, 16), ("llama-7b", 1024, 64))


class Case(NamedTuple):
    """operands(dtype, device, adapters) gives keyword arguments, D and U in the dtype `adapters`;
    run(kernels, **operands) the outputs by name.

    ops: the ops of `dispatch.OPS` that rest on it.
    """

    name: str
    ops: tuple[str, ...]
    operands: Callable[..., dict]
    run: Callable[..., dict[str, Tensor | None]]


class _Random:
    """Tensors on one device; `columns` gives matrices whose rows do not follow one another."""

    def __init__(self, dtype: torch.dtype, device: str, adapters: torch.dtype | None):
        torch.manual_seed(0)
        self.options, self.adapters = {"dtype": dtype, "device": device}, adapters or dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, **self.options)

    def matrix(self, num_rows: int, num_cols: int) -> Tensor:
        return self.normal(num_rows, num_cols) * num_cols**-0.5

    def adapter(self, num_rows: int, num_cols: int) -> Tensor:
        return self.matrix(num_rows, num_cols).to(self.adapters)

    def columns(self, num_rows: int, num_cols: int) -> Tensor:
        return self.normal(num_rows, num_cols + 8)[:, :num_cols]

    def seed(self) -> Tensor:
        return torch.tensor(0x0123_4567_89AB_CDEF, device=self.options["device"])


def _prologue_operands(name, rank, sizes, dtype, device, adapters=None):
    """Gate and up are columns of one buffer, as their GEMM leaves them."""
    num_rows, width = sizes
    random = _Random(dtype, device, adapters)
    count = 2 if name == "swiglu" else 1
    return {
        "x": random.columns(num_rows, count * width).split(width, dim=1),
        "gain": random.normal(width) if name == "rms_norm" else None,
        "down": random.adapter(rank, width) if rank else None,
        "da": random.normal(num_rows, rank) if rank else None,
        "dh": random.normal(num_rows, width),
        "dresidual": None if name == "swiglu" else random.columns(num_rows, width),
        "seed": random.seed(),
    }


def _low_rank(down, p, seed):
    return None if down is None else LowRank(down, Mask(p, 2, seed) if p else None)


def _prologue(kernels, *, name, p, x, gain, down, seed, **_):
    h, _, a = kernels.prologue(PrologueSpec(name, gain, _EPS, None), x, _low_rank(down, p, seed))
    return {"h": h, "a": a}


def _shrink(kernels, *, p, x, down, seed, **_):
    _, _, a = kernels.prologue(PrologueSpec("none", None, _EPS, None), x[:1], _low_rank(down, p, seed), need_h=False)
    return {"a": a}


def _prologue_backward(kernels, *, name, p, what, x, gain, down, da, dh, dresidual, seed):
    """what: of dx and dD the ones that are wanted."""
    low_rank = [] if down is None else [(_low_rank(down, p, seed), da)]
    rstd = rms_norm_forward(x[0], gain, _EPS)[1] if name == "rms_norm" else None
    wants_dx = "dx" in what
    grads = kernels.prologue_backward(
        PrologueSpec(name, gain, _EPS, None), dh if wants_dx else None, x, rstd, low_rank=low_rank,
        ddown_wanted=["ddown" in what] * len(low_rank), need_dx=(wants_dx,) * len(x),
        need_dgain=wants_dx and gain is not None, dresidual=dresidual if wants_dx else None,
    )  # fmt: skip
    outputs = {f"dx{i}": part for i, part in enumerate(grads.dx)}
    return outputs | {"dgain": grads.dgain, **dict.fromkeys(["ddown"], *grads.ddowns)}


def _gemm_operands(widths, sizes, extras, dtype, device, adapters=None):
    num_rows, depth, rank = sizes
    random = _Random(dtype, device, adapters)
    return {
        "x": random.normal(num_rows, depth),
        "weight": random.matrix(sum(widths), depth),
        "z": random.normal(num_rows, len(widths) * rank),
        "up": random.adapter(sum(widths), rank),
        "bias": random.normal(sum(widths)) if extras else None,
        "residual": random.normal(num_rows, sum(widths)) if extras else None,
    }


def _lowrank_gemm(kernels, *, widths, x, weight, z, up, bias, residual):
    starts = [sum(widths[:i]) for i in range(len(widths))]
    parts = zip(z.split(up.shape[1], dim=1), up.split(widths), starts, widths, strict=True)
    terms = [Term(z_i, up_i, _SCALING, start, start + width) for z_i, up_i, start, width in parts]
    return {"y": kernels.lowrank_gemm(x, weight, terms, bias=bias, residual=residual)}


def wide(widths, operands: dict) -> tuple[Tensor, Tensor]:
    """x and the weight with columns for z and s U, block-diagonal: what the layout way of the GEMM multiplies."""
    blocks = torch.block_diag(*(_SCALING * part.float() for part in operands["up"].split(widths)))
    weight = torch.cat((operands["weight"], blocks.to(operands["weight"].dtype)), dim=1)
    return torch.cat((operands["x"], operands["z"]), dim=1), weight


def layout(widths, operands: dict) -> dict:
    x, weight = wide(widths, operands)
    return {"y": x @ weight.t()}


def _dx_operands(sizes, dtype, device, adapters=None):
    num_rows, depth, num_out = sizes
    random = _Random(dtype, device, adapters)
    return {
        "dy": random.normal(num_rows, num_out),
        "weight": random.matrix(num_out, depth),
    }


def _lowrank_gemm_dx(kernels, *, dy, weight):
    return {"dx": kernels.lowrank_gemm_dx(dy, weight)}


def _masked_dx_operands(rank, sizes, dtype, device, adapters=None):
    random = _Random(dtype, device, adapters)
    branches = {"da": random.normal(sizes[0], rank), "down": random.adapter(rank, sizes[1]), "seed": random.seed()}
    return {**_dx_operands(sizes, dtype, device, adapters), **branches}


def _masked_dx(kernels, *, p, dy, weight, da, down, seed):
    return {"dx": kernels.lowrank_gemm_dx(dy, weight, low_rank=(_low_rank(down, p, seed), da))}


def dx_in_two_passes(kernels, *, p, dy, weight, da, down, seed) -> dict:
    """The low-rank part added by a pass over what the library's GEMM made."""
    dx = dy @ weight
    grads = kernels.prologue_backward(
        PrologueSpec("none", None, _EPS, None), dx, (None,), None, low_rank=[(_low_rank(down, p, seed), da)],
        ddown_wanted=[False], need_dx=(True,),
    )  # fmt: skip
    return {"dx": grads.dx[0]}


def _dy_operands(widths, sizes, dtype, device, adapters=None):
    num_rows, rank = sizes
    random = _Random(dtype, device, adapters)
    return {
        "dy": random.columns(num_rows, sum(widths)),
        "a": random.normal(num_rows, len(widths) * rank),
        "up": random.adapter(sum(widths), rank),
    }


def _dy_pass(kernels, *, widths, activation, dy, a, up):
    count = len(widths)
    das, dups = kernels.dy_pass(
        dy.split(widths, dim=1), a.split(up.shape[1], dim=1), up.split(widths), scalings=[_SCALING] * count,
        activations=[activation] * count, need_da=[True] * count, need_dup=[True] * count,
    )  # fmt: skip
    return {"da": torch.cat(das, dim=1), "dup": torch.cat(dups)}


def call_case(kernel: str, call: LinearCall, m: int, r: int, p: float) -> Case:
    """The part of a linear call of `m` rows with branches of rank `r` that `kernel`, of `KERNELS`, runs."""
    widths, rank = list(call.num_outs), r * len(call.num_outs)
    name = f"{kernel} {call.prologue} {m}x{call.width}x{sum(widths)} r{r} p{p}"
    norm = ("fused_linear", "rms_norm") if call.prologue == "rms_norm" else ("fused_linear",)
    rows = partial(_prologue_operands, call.prologue, rank, (m, call.width))
    backward = partial(_prologue_backward, name=call.prologue, p=p)
    parts = {
        "prologue": (norm, rows, partial(_prologue, name=call.prologue, p=p)),
        "prologue_backward": (norm, rows, partial(backward, what=("dx",))),
        "shrink": (norm[:1], partial(_prologue_operands, "none", rank, (m, call.width)), partial(_shrink, p=p)),
        "ddown": (norm, rows, partial(backward, what=("ddown",))),
        "dy_pass": (
            norm[:1], partial(_dy_operands, widths, (m, r)), partial(_dy_pass, widths=widths, activation="identity")
        ),
        "lowrank_gemm fwd": (
            norm[:1], partial(_gemm_operands, widths, (m, call.width, r), call.residual),
            partial(_lowrank_gemm, widths=widths),
        ),
        "lowrank_gemm dx": (norm[:1], partial(_dx_operands, (m, call.width, sum(widths))), _lowrank_gemm_dx),
        "masked_dx": (
            norm[:1], partial(_masked_dx_operands, rank, (m, call.width, sum(widths))), partial(_masked_dx, p=p)
        ),
    }  # fmt: skip
    return Case(name, *parts[kernel])


def kernel_cases() -> Iterator[Case]:
    """Every kernel at calls with and without branches and masks, ragged ones first, those of 7B models last."""
    ragged = [
        (LinearCall("rms_norm", 33, (130, 7, 48)), 7, 3), (LinearCall("swiglu", 130, (33,)), 1, 1),
        (LinearCall("none", 72, (200, 200)), 33, 20), (LinearCall("swiglu", 512, (768,)), 200, 64),
        (LinearCall("rms_norm", 128, (256, 256)), 64, 16),
    ]  # fmt: skip
    large = [(call, m, r) for dims, m, r in _LARGE for call in linear_calls(DIMS[dims]).values()]
    for call, m, r in ragged + large:
        for p in (0.1, 0.0):
            yield from (call_case(kernel, call, m, r, p) for kernel in KERNELS if p or "gemm" not in kernel)
        yield from (call_case(kernel, call, m, 0, 0.0) for kernel in KERNELS[:2])

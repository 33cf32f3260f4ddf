"""`fused_linear`'s schedule as two opaque ops, one forward and one backward (`ops/opaque.py`).

Outputs of segments that may be one GEMM are one buffer [M, sum N_i], as are the gradients of gate and up, so that
their views meet the next op side by side; where the weights turn out to lie apart, that costs a copy.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.ops import schedule, stacking
from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.fused_call import (
    Call,
    CallSpec,
    Grads,
    Kept,
    Needs,
    flatten_segments,
    spec_from_text,
    unflatten_grads,
    unflatten_segments,
)
from mmpeft_fast.ops.opaque import opaque
from mmpeft_fast.ops.providers import kernel_set_of


class OpaqueRunner(NamedTuple):
    """`schedule.Runner` behind opaque ops, on the kernels that run when these do. provider: the one that was asked for,
    if any."""

    provider: str | None
    is_taped = False

    def forward(self, call: Call, need: Needs) -> tuple[list[Tensor], Kept]:
        results = iter(
            torch.ops.mmpeft_fast.fused_linear_forward(self.provider, call.spec.as_text(), need.flags, _flatten(call))
        )
        widths = [seg.weight.shape[0] for seg in call.segments]
        if schedule.may_be_stacked(call.segments):
            outputs = list(next(results).split(widths, dim=1))
        else:
            outputs = [next(results) for _ in widths]
        return outputs, _kept(call, need, lambda *_: next(results))

    def backward(self, call: Call, need: Needs, kept: Kept, dys: Sequence[Tensor], dcarry: Tensor | None) -> Grads:
        results = iter(
            torch.ops.mmpeft_fast.fused_linear_backward(
                self.provider, call.spec.as_text(), need.flags, _flatten(call), *kept, dys, dcarry
            )
        )
        if _has_joint_dx(need):
            x = next(results).chunk(2, dim=1)
        else:
            x = tuple(next(results) if wanted else None for wanted in need.x)
        gain, in_scale, *flat = (next(results) if wanted else None for wanted in _wanted(need, call.spec))
        return Grads(dys[0] if need.residual else None, gain, in_scale, x, unflatten_grads(call.spec, flat))


def _flatten(call: Call) -> list[Tensor | None]:
    return [call.residual, call.gain, call.in_scale, call.seed, *call.x, *flatten_segments(call.segments)]


def _call(text: str, tensors: Sequence[Tensor | None]) -> Call:
    """The inverse of `_flatten`."""
    spec = spec_from_text(text)
    residual, gain, in_scale, seed, *rest = tensors
    x = tuple(part if part is None else schedule.with_plain_rows(part) for part in rest[: spec.num_inputs])
    return Call(spec, residual, gain, in_scale, seed, x, unflatten_segments(spec, rest[spec.num_inputs :]))


def _has_joint_dx(need: Needs) -> bool:
    return len(need.x) == 2 and all(need.x)


def _wanted(need: Needs, spec: CallSpec) -> tuple[bool, ...]:
    """Which of the gradients of gain, input scale and the segments' tensors are wanted."""
    return need.gain, need.in_scale, *need.flags[4 + spec.num_inputs :]


def _kept(call: Call, need: Needs, take: Callable[[int, torch.dtype], Tensor]) -> Kept:
    """What a forward pass keeps, from a source of tensors [M, columns] of a dtype."""
    dtype, width = call.x[0].dtype, {}
    for seg in call.segments:
        for branch in seg.inner:
            width[branch.spec.mask] = width.get(branch.spec.mask, 0) + branch.down.shape[0]
    wants = list(zip(call.segments, need.segments, strict=True))
    return Kept(
        take(1, accumulate_dtype(dtype)) if call.spec.prologue == "rms_norm" and need.kept_x else None,
        [take(rank, dtype) for rank in width.values()],
        [take(branch.down.shape[0], dtype) for seg, _ in wants for branch in seg.post],
        [
            take(seg.weight.shape[0], dtype) if want.out_scale else None
            for seg, want in wants
            if seg.out_scale is not None
        ],
        [
            take(seg.weight.shape[0], dtype) if any(branch.down for branch in want.branches) else None
            for seg, want in wants
            if seg.post
        ],
    )


def _present(outputs: Sequence[Tensor], kept: Kept) -> list[Tensor]:
    """The results of a forward op: what there is of them, in the order in which `_kept` takes them."""
    rstd, *lists = kept
    return [item for items in (outputs, [rstd], *lists) for item in items if item is not None]


def _run_forward(provider, text, flags, tensors) -> list[Tensor]:
    call = _call(text, tensors)
    kernels = kernel_set_of(provider, "fused_linear", call.x[0])
    outputs, kept = schedule.Runner(kernels).forward(call, Needs(flags, call.spec))
    if schedule.may_be_stacked(call.segments):
        outputs = [stacking.columns(outputs)]
    return _present(outputs, kept)


def _fake_forward(provider, text, flags, tensors) -> list[Tensor]:
    call = _call(text, tensors)
    x = call.x[0]

    def empty(columns: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return x.new_empty(x.shape[0], columns, dtype=dtype)

    widths = [seg.weight.shape[0] for seg in call.segments]
    outputs = [empty(width) for width in ([sum(widths)] if schedule.may_be_stacked(call.segments) else widths)]
    kept = _kept(call, Needs(flags, call.spec), empty)
    return _present(outputs, kept)


def _run_backward(provider, text, flags, tensors, rstd, a_inner, a_post, before_scale, before_post, dys, dcarry):
    call = _call(text, tensors)
    need, kept = Needs(flags, call.spec), Kept(rstd, a_inner, a_post, before_scale, before_post)
    runner = schedule.Runner(kernel_set_of(provider, "fused_linear", dys[0]))
    grads = runner.backward(call, need, kept, dys, dcarry, joint_dx=_has_joint_dx(need))
    dx = [stacking.columns(grads.x)] if _has_joint_dx(need) else list(itertools.compress(grads.x, need.x))
    others = [grads.gain, grads.in_scale, *flatten_segments(grads.segments)]
    return [*dx, *itertools.compress(others, _wanted(need, call.spec))]


def _fake_backward(provider, text, flags, tensors, rstd, a_inner, a_post, before_scale, before_post, dys, dcarry):
    call = _call(text, tensors)
    need = Needs(flags, call.spec)
    num_rows, width = dys[0].shape[0], call.segments[0].weight.shape[1]
    widths = [2 * width] if _has_joint_dx(need) else [width] * sum(need.x)
    others = [call.gain, call.in_scale, *flatten_segments(call.segments)]
    # The gradient of a parameter has its shape and dtype.
    return [
        *(dys[0].new_empty(num_rows, columns) for columns in widths),
        *(other.new_empty(other.shape) for other in itertools.compress(others, _wanted(need, call.spec))),
    ]


_CALL = "str? provider, str spec, bool[] needs, Tensor?[] tensors"
opaque("fused_linear_forward", f"({_CALL})", _run_forward, _fake_forward)
opaque(
    "fused_linear_backward",
    f"({_CALL}, Tensor? rstd, Tensor[] a_inner, Tensor[] a_post, Tensor?[] before_scale, Tensor?[] before_post, "
    "Tensor[] dys, Tensor? dcarry)",
    _run_backward,
    _fake_backward,
)

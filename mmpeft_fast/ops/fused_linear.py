"""One op for every method: prologue, frozen GEMMs with bottleneck branches, epilogue.

    h   = prologue(x)                                       none | rms_norm | swiglu, input scale folded in
    y_i = W_i (h + sum_pre s U f(D drop h)) + b_i + sum_parallel s U f(D drop h)        segments i share h
    y_i = y_i * l_i                                         output scale
    y_i = y_i + sum_post s U f(D drop y_i) + residual       epilogue

A branch may be gated: f(..) is multiplied by a number a row and expert, a block of neighbouring ranks (`Branch.gate`).
LoRA (Hu et al. 2021, eq. 3) is a parallel branch with f = identity; the study's Adapter is pre on gate and up, post on
down (arXiv 2406.05130); IA3 (Liu et al. 2022) is the scales. The backward is written by hand: it saves x, rstd and
a = D drop(h) only, recomputes h from x and z from a, and computes nothing that no gradient asks for.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops import schedule, tape
from mmpeft_fast.ops.activations import ACTIVATIONS
from mmpeft_fast.ops.autocast import autocast_dtype, without_autocast
from mmpeft_fast.ops.dropout import draw_seed, dropout_ref
from mmpeft_fast.ops.fused_call import (
    BranchSpec,
    Call,
    CallSpec,
    Kept,
    Needs,
    call_spec,
    flatten_segments,
    mask_key,
    unflatten_segments,
)
from mmpeft_fast.ops.opaque import traceable
from mmpeft_fast.ops.opaque_linear import OpaqueRunner
from mmpeft_fast.ops.packed import PackedWeight, unpacked
from mmpeft_fast.ops.prologue import prologue_ref
from mmpeft_fast.ops.providers import forced_provider, kernel_set
from mmpeft_fast.ops.segments import POSITIONS, Branch, Segment, check_call


class _FusedLinear(torch.autograd.Function):
    """Arguments after `runner` (None: the schedule on the kernels of the moment), `check` (raises where the call does
    not fit together), `spec`, `carry` and `makers` (of the inputs, which are then made again in the backward):
    residual, gain, in_scale, seed, the inputs (one or two), then the segments' tensors in the order of
    `flatten_segments`. Returns a y a segment and, with `carry`, the first input. Packed weights are tensors while a
    pass runs, and in none of those that are saved."""

    @staticmethod
    def forward(ctx, runner, check, spec, carry, makers, *tensors):
        ctx.runner, ctx.spec = runner or schedule.Runner(kernel_set("fused_linear", tensors[4])), spec
        ctx.packed = {i: tensor for i, tensor in enumerate(tensors) if isinstance(tensor, PackedWeight)}
        if ctx.packed:
            tensors = unpacked(ctx.packed, tensors, tensors[4].dtype)
        arguments = spec, ctx.needs_input_grad[5:]
        outputs, saved, ctx.lengths = tape.run_step(_forward, ctx.runner, arguments, tensors, check=check)
        ctx.makers = makers
        ctx.can_be_remade = tensors[0] is None and all(part is not None for part in saved[4 : 4 + spec.num_inputs])
        missing = {*ctx.packed, *range(4, 4 + len(makers or ()))}
        ctx.output_shapes = [y.shape for y in outputs]
        ctx.set_materialize_grads(False)
        # What is saved has inputs and weights in the places where the arguments have them.
        ctx.save_for_backward(*(None if i in missing else tensor for i, tensor in enumerate(saved)))
        if carry:
            outputs.append(tensors[4])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        shapes = ctx.output_shapes
        given = next((dy for dy in dys if dy is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        made = []
        if ctx.makers is not None:
            with recomputing():
                made = [schedule.with_plain_rows(x) for x in made_again(ctx.makers)]
        dcarry = dys[len(shapes)] if len(dys) > len(shapes) else None
        dys = [given.new_zeros(shape) if dy is None else dy for dy, shape in zip(dys, shapes, strict=False)]
        saved = _saved(ctx)
        if ctx.packed:
            saved = unpacked(ctx.packed, saved, dys[0].dtype)
        if made:
            saved = (*saved[:4], *made, *saved[4 + len(made) :])
        arguments = ctx.spec, ctx.needs_input_grad[5:], ctx.lengths, len(dys)
        grads = tape.run_step(_backward, ctx.runner, arguments, (*dys, dcarry, *saved))
        return None, None, None, None, None, *grads


Makers = tuple[tuple[Any, int], ...]
"""The node of a fused linear and which of its outputs, for each input."""
# What `_apply` and the layers do to an output of a fused linear without changing a value.
_VIEWS = {"ViewBackward0", "ReshapeAliasBackward0", "UnsafeViewBackward0"}
# The planner puts a context here, to count what runs inside as computed again.
recomputing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def makers_of(inputs: Sequence[Tensor]) -> Makers | None:
    """By what call each input was made, where that call can make all of them again: the same one, of plain kinds."""
    found = []
    for tensor in inputs:
        node, index = tensor.grad_fn, tensor.output_nr
        while node is not None and node.name() in _VIEWS:
            node, index = node.next_functions[0]
        found.append((node, index))
    nodes = {id(node) for node, _ in found}
    is_made = len(nodes) == 1 and isinstance(found[0][0], _FusedLinear._backward_cls) and found[0][0].can_be_remade
    return tuple(found) if is_made else None


def made_again(makers: Makers) -> list[Tensor]:
    """The inputs that `makers` had made, by the same steps on the same tensors: the same bits."""
    node = makers[0][0]
    node.read_before = saved = _saved(node)
    gain, in_scale, seed, _, *rest = saved
    tensors = (None, gain, in_scale, seed, *rest[: sum(node.lengths[:2])])
    if node.packed:
        tensors = unpacked(node.packed, tensors, tensors[4].dtype)
    outputs, _, _ = tape.run_step(_forward, node.runner, (node.spec, node.needs_input_grad[5:]), tensors)
    return [outputs[index] for _, index in makers]


def _saved(ctx) -> tuple[Tensor | None, ...]:
    """What a node has saved; it may be asked for only once where a layer is checkpointed."""
    before = ctx.__dict__.pop("read_before", None)
    return ctx.saved_tensors if before is None else before


def _forward(runner, spec: CallSpec, flags: tuple[bool, ...], *tensors: Tensor | None):
    """Outputs, what is saved, and how many of that stand together."""
    residual, gain, in_scale, seed, *rest = tensors
    x, flat = tuple(rest[: spec.num_inputs]), rest[spec.num_inputs :]
    need = Needs(flags, spec)
    call = Call(spec, residual, gain, in_scale, seed, x, unflatten_segments(spec, flat))
    outputs, kept = runner.forward(call, need)
    lists = [x if need.kept_x else (None,) * len(x), flat, *kept[1:]]
    saved = [gain, in_scale, seed, kept.rstd, *(tensor for items in lists for tensor in items)]
    return outputs, saved, tuple(len(items) for items in lists)


def _backward(runner, spec: CallSpec, flags: tuple[bool, ...], lengths: tuple[int, ...], num_outputs: int, *tensors):
    """The gradients of `_forward`'s tensors; tensors: dy of the outputs, dcarry, and what was saved."""
    dys, (dcarry, gain, in_scale, seed, rstd, *saved) = tensors[:num_outputs], tensors[num_outputs:]
    lists = []
    for length in lengths:
        lists.append(saved[:length])
        saved = saved[length:]
    x, flat, *kept = lists
    call = Call(spec, None, gain, in_scale, seed, tuple(x), unflatten_segments(spec, flat))
    grads = runner.backward(call, Needs(flags, spec), Kept(rstd, *kept), dys, dcarry)
    return grads.residual, grads.gain, grads.in_scale, None, *grads.x, *flatten_segments(grads.segments)


def fused_linear(
    x: Tensor | tuple[Tensor, Tensor],
    segments: Sequence[Segment],
    *,
    prologue: str = "none",
    gain: Tensor | None = None,
    eps: float = 1e-6,
    in_scale: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
    carry: bool = False,
    recompute: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Linear layers that share an input, with everything PEFT adds to them, in one differentiable op.

    Args:
        x: [..., K]; a pair (gate, up) of [..., K] for prologue "swiglu". Under autocast x, weights and biases are cast
            as torch's linear layers cast them; a residual of a wider dtype stays in it.
        segments: weights [N_i, K] in x's dtype (usually frozen; differentiated where they require grad) with optional
            bias, branches and output scale. Branch and scale parameters may have a wider dtype than x. A weight may be
            a `PackedWeight`; where those are multiplied in another dtype than x's, all of the call is computed in it,
            and y has x's.
        prologue: "none", "rms_norm" (needs `gain` [K]) or "swiglu".
        eps: of rms_norm.
        in_scale: [K], multiplied onto the prologue's result.
        residual: [..., N], added last; one segment only.
        seed: 0-dim int64 seed of the dropout masks; drawn from torch's generator when None.
        stream: 0 to 4095, keeps the masks of calls that share a seed apart.
        carry: also return x, for the residual connection around this op: what it contributes to dx is added inside the
            prologue's backward instead of by a pass of its own.
        recompute: where one call of this op made all of x and has no residual, x is not kept for the backward but made
            again there, from what that call keeps; x is kept where it was not made so, under torch.compile, and where
            it has to be cast first. The same gradients bit for bit.

    Returns:
        y [..., N] in x's dtype, or a tuple with one such tensor a segment; with `carry` a tuple that ends in x.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message has the expectation and what came.
    """
    x = x if isinstance(x, tuple) else (x,)
    dtype = autocast_dtype(x[0])
    given = None if dtype is not None else _dtype_of_packed(x[0], segments)
    if dtype is not None or given is not None:
        options = {
            "prologue": prologue, "gain": gain, "eps": eps, "in_scale": in_scale, "seed": seed, "stream": stream,
            "recompute": recompute,
        }  # fmt: skip
        return _in_dtype(dtype or given, x, segments, residual, carry, options, y_dtype=None if dtype else x[0].dtype)
    segments = _with_gates_by_row(x[0], segments)
    check = functools.partial(check_call, x, segments, prologue, gain, in_scale, residual)
    if torch.compiler.is_compiling() or len(x) != (2 if prologue == "swiglu" else 1):
        check()
    if seed is None and any(mask_key(b.dropout, b.stream, b.position) for seg in segments for b in seg.branches):
        seed = draw_seed(x[0].device)
    if torch.compiler.is_compiling():
        y = _compiled(x, segments, prologue, gain, eps, in_scale, residual, seed, stream, carry)
    else:
        spec = call_spec(prologue, eps, segments, stream)
        makers = makers_of(x) if recompute and torch.is_grad_enabled() else None
        y = _apply(None, check, spec, carry, residual, gain, in_scale, seed, x, flatten_segments(segments), makers)
    return tuple(y) if len(y) > 1 else y[0]


def _with_gates_by_row(x: Tensor, segments: Sequence[Segment]) -> Sequence[Segment]:
    """Segments whose gates are [M, E]; the same where there are none. Raises ValueError for one that does not fit x."""
    if not any(branch.gate is not None for seg in segments for branch in seg.branches):
        return segments

    def by_row(branch: Branch) -> Branch:
        gate, lead = branch.gate, x.shape[:-1]
        if gate is None:
            return branch
        try:
            return branch._replace(gate=gate.expand(*lead, gate.shape[-1]).reshape(-1, gate.shape[-1]))
        except RuntimeError as error:
            expected = f"a gate that can be broadcast to {[*lead, 'experts']}"
            raise ValueError(f"fused_linear: expected {expected}, got {list(gate.shape)}") from error

    return [seg._replace(branches=tuple(map(by_row, seg.branches))) for seg in segments]


def _apply(
    runner, check, spec, carry, residual, gain, in_scale, seed, x, flat, makers: Makers | None = None
) -> list[Tensor]:
    """`_FusedLinear` on tensors of any number of dimensions."""
    lead = x[0].shape[:-1]
    inputs = [schedule.with_plain_rows(part.reshape(-1, part.shape[-1])) for part in x]
    flat_residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
    y = _FusedLinear.apply(runner, check, spec, carry, makers, flat_residual, gain, in_scale, seed, *inputs, *flat)
    return [part.view(*lead, part.shape[-1]) for part in (y if isinstance(y, tuple) else (y,))]


def _compiled(x, segments, prologue, gain, eps, in_scale, residual, seed, stream, carry) -> list[Tensor]:
    """The call as one node of a compiler's graph: numbers, strings and lists of tensors."""
    branches = [branch for seg in segments for branch in seg.branches]
    return torch.ops.mmpeft_fast.fused_linear(
        forced_provider(), prologue, eps, stream, carry,
        [len(seg.branches) for seg in segments],
        [branch.activation for branch in branches],
        [branch.position for branch in branches],
        [branch.scaling for branch in branches],
        [branch.dropout for branch in branches],
        [branch.stream for branch in branches],
        [residual, gain, in_scale, seed, *x, *flatten_segments(segments)],
    )  # fmt: skip


def _traceable_fused_linear(
    provider, prologue, eps, stream, carry, num_branches, activations, positions, scalings, dropouts, streams, tensors
):  # fmt: skip
    masks = [mask_key(*of_branch, stream) for of_branch in zip(dropouts, streams, positions, strict=True)]
    branches = map(BranchSpec, scalings, activations, positions, masks)
    spec = CallSpec(prologue, eps, tuple(tuple(itertools.islice(branches, number)) for number in num_branches))
    residual, gain, in_scale, seed, *rest = tensors
    x, flat = rest[: spec.num_inputs], rest[spec.num_inputs :]
    return _apply(OpaqueRunner(provider), None, spec, carry, residual, gain, in_scale, seed, x, flat)


traceable(
    "fused_linear",
    "(str? provider, str prologue, float eps, int stream, bool carry, int[] num_branches, str[] activations, "
    "str[] positions, float[] scalings, float[] dropouts, int[] streams, Tensor?[] tensors) -> Tensor[]",
    _traceable_fused_linear,
)


def _dtype_of_packed(x: Tensor, segments: Sequence[Segment]) -> torch.dtype | None:
    """What packed weights are multiplied in where their call has to be cast to it; None where it is in it already.

    Raises:
        ValueError: segments ask for several dtypes, or a compiler is at work.
    """
    packed = [seg for seg in segments if isinstance(seg.weight, PackedWeight)]
    if not packed:
        return None
    dtypes = {seg.weight.dtype or x.dtype for seg in packed} | {seg.weight.dtype for seg in segments} - {None}
    if len(dtypes) > 1:
        raise ValueError(
            f"fused_linear: expected weights that are multiplied in one dtype, got {sorted(map(str, dtypes))}"
        )
    if torch.compiler.is_compiling():
        raise ValueError("fused_linear: expected plain tensors as weights under torch.compile, got packed ones")
    (dtype,) = dtypes
    in_it = dtype == x.dtype and all(seg.bias is None or seg.bias.dtype == dtype for seg in packed)
    return None if in_it else dtype


def _in_dtype(dtype, x, segments, residual, carry, options, *, y_dtype) -> Tensor | tuple[Tensor, ...]:
    """`fused_linear` in autocast's dtype, or in that of packed weights. y_dtype: that of the results, None for
    `dtype`."""
    cast = [
        seg._replace(weight=seg.weight.to(dtype), bias=None if seg.bias is None else seg.bias.to(dtype))
        for seg in segments
    ]
    # What travels between the layers keeps the dtype that it has there.
    added = residual if residual is not None and residual.dtype == dtype else None
    carried = carry and x[0].dtype == dtype
    with without_autocast(x[0]):
        y = fused_linear(tuple(part.to(dtype) for part in x), cast, residual=added, carry=carried, **options)
    if y_dtype is not None:
        y = tuple(part.to(y_dtype) for part in y) if isinstance(y, tuple) else y.to(y_dtype)
    if residual is not None and added is None:
        y = residual + y
    return (*(y if isinstance(y, tuple) else (y,)), x[0]) if carry and not carried else y


def fused_linear_ref(
    x: Tensor | tuple[Tensor, Tensor],
    segments: Sequence[Segment],
    *,
    prologue: str = "none",
    gain: Tensor | None = None,
    eps: float = 1e-6,
    in_scale: Tensor | None = None,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, ...]:
    """The definition of `fused_linear` in plain differentiable torch; always a tuple. No `seed`: torch's dropout."""
    x = x if isinstance(x, tuple) else (x,)
    h = prologue_ref(prologue, x, gain, eps, in_scale)

    def contribution(branch: Branch, operand: Tensor) -> Tensor:
        _, mask_stream = mask_key(branch.dropout, branch.stream, branch.position, stream) or (0.0, 0)
        kept = dropout_ref(operand, seed, branch.dropout, stream=mask_stream)
        z = ACTIVATIONS[branch.activation].function(kept @ branch.down.to(operand.dtype).t())
        z = z if branch.gate is None else schedule.by_expert(z, branch.gate)
        return branch.scaling * z @ branch.up.to(operand.dtype).t()

    outputs = []
    for seg in segments:
        by_position = {name: [b for b in seg.branches if b.position == name] for name in POSITIONS}
        operand = sum((contribution(branch, h) for branch in by_position["pre"]), h)
        y = torch.nn.functional.linear(operand, seg.weight, seg.bias)
        y = sum((contribution(branch, h) for branch in by_position["parallel"]), y)
        y = y if seg.out_scale is None else (y * seg.out_scale).to(y.dtype)
        y = sum((contribution(branch, y) for branch in by_position["post"]), y)
        outputs.append(y if residual is None else y + residual)
    return tuple(outputs)

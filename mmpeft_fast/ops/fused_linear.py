"""One op for every method: prologue, frozen GEMMs with bottleneck branches, epilogue.

    h   = prologue(x)                                       none | rms_norm | swiglu, input scale folded in
    y_i = W_i (h + sum_pre s U f(D drop h)) + b_i + sum_parallel s U f(D drop h)        segments i share h
    y_i = y_i * l_i                                         output scale
    y_i = y_i + sum_post s U f(D drop y_i) + residual       epilogue

LoRA (Hu et al. 2021, eq. 3) is a parallel branch with f = identity; the study's Adapter is pre on gate and up, post on
down (arXiv 2406.05130); IA3 (Liu et al. 2022) is the scales. The backward is written by hand: it saves x, rstd and
a = D drop(h) only, recomputes h from x and z from a, and computes nothing that no gradient asks for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops import schedule
from mmpeft_fast.ops.activations import ACTIVATIONS
from mmpeft_fast.ops.dropout import draw_seed, dropout_ref
from mmpeft_fast.ops.fused_call import Call, Kept, Needs, call_spec, flatten_segments, mask_key, unflatten_segments
from mmpeft_fast.ops.prologue import prologue_ref
from mmpeft_fast.ops.providers import kernel_set
from mmpeft_fast.ops.segments import POSITIONS, Branch, Segment, check_call


class _FusedLinear(torch.autograd.Function):
    """Arguments after `spec` and `carry`: residual, gain, in_scale, seed, the inputs (one or two), then the segments'
    tensors in the order of `flatten_segments`. Returns a y a segment and, with `carry`, the first input."""

    @staticmethod
    def forward(ctx, spec, carry, residual, gain, in_scale, seed, *tensors):
        x, flat = tensors[: spec.num_inputs], tensors[spec.num_inputs :]
        need = Needs(ctx.needs_input_grad[2:], spec)
        call = Call(spec, residual, gain, in_scale, seed, x, unflatten_segments(spec, flat))
        ctx.kernels = kernel_set("fused_linear", x[0])
        outputs, kept = schedule.forward(ctx.kernels, call, need)
        lists = [x if need.kept_x else (None,) * len(x), flat, *kept[1:]]
        ctx.spec, ctx.lengths = spec, [len(items) for items in lists]
        ctx.output_shapes = [y.shape for y in outputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gain, in_scale, seed, kept.rstd, *(tensor for items in lists for tensor in items))
        if carry:
            outputs.append(x[0])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        gain, in_scale, seed, rstd, *saved = ctx.saved_tensors
        lists = []
        for length in ctx.lengths:
            lists.append(saved[:length])
            saved = saved[length:]
        x, flat, *kept = lists
        call = Call(ctx.spec, None, gain, in_scale, seed, tuple(x), unflatten_segments(ctx.spec, flat))
        need = Needs(ctx.needs_input_grad[2:], ctx.spec)
        dys, dcarry = dys[: len(ctx.output_shapes)], dys[len(ctx.output_shapes) :]
        given = next((dy for dy in (*dys, *dcarry) if dy is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        dys = [
            given.new_zeros(shape) if dy is None else _with_plain_rows(dy)
            for dy, shape in zip(dys, ctx.output_shapes, strict=True)
        ]
        grads = schedule.backward(ctx.kernels, call, need, Kept(rstd, *kept), dys, dcarry[0] if dcarry else None)
        return None, None, *grads[:3], None, *grads.x, *flatten_segments(grads.segments)


def _with_plain_rows(x: Tensor) -> Tensor:
    """x [M, N] with unit column stride and rows that do not overlap, copied only where it has not."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


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
) -> Tensor | tuple[Tensor, ...]:
    """Linear layers that share an input, with everything PEFT adds to them, in one differentiable op.

    Args:
        x: [..., K]; a pair (gate, up) of [..., K] for prologue "swiglu".
        segments: weights [N_i, K] in x's dtype (usually frozen; differentiated where they require grad) with optional
            bias, branches and output scale. Branch and scale parameters may have a wider dtype than x.
        prologue: "none", "rms_norm" (needs `gain` [K]) or "swiglu".
        eps: of rms_norm.
        in_scale: [K], multiplied onto the prologue's result.
        residual: [..., N], added last; one segment only.
        seed: 0-dim int64 seed of the dropout masks; drawn from torch's generator when None.
        stream: 0 to 4095, keeps the masks of calls that share a seed apart.
        carry: also return x, for the residual connection around this op: what it contributes to dx is added inside the
            prologue's backward instead of by a pass of its own.

    Returns:
        y [..., N] in x's dtype, or a tuple with one such tensor a segment; with `carry` a tuple that ends in x.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message has the expectation and what came.
    """
    x = x if isinstance(x, tuple) else (x,)
    check_call(x, segments, prologue, gain, in_scale, residual)
    spec = call_spec(prologue, eps, segments, stream)
    if seed is None and any(branch.mask is not None for branches in spec.segments for branch in branches):
        seed = draw_seed(x[0].device)
    lead = x[0].shape[:-1]
    inputs = [_with_plain_rows(part.reshape(-1, part.shape[-1])) for part in x]
    flat_residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
    y = _FusedLinear.apply(spec, carry, flat_residual, gain, in_scale, seed, *inputs, *flatten_segments(segments))
    if isinstance(y, tuple):
        return tuple(part.view(*lead, part.shape[-1]) for part in y)
    return y.view(*lead, y.shape[-1])


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
        a = kept @ branch.down.to(operand.dtype).t()
        return branch.scaling * ACTIVATIONS[branch.activation].function(a) @ branch.up.to(operand.dtype).t()

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

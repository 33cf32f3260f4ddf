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
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops.activations import ACTIVATIONS, activation_backward
from mmpeft_fast.ops.dropout import draw_seed, dropout_ref, keep_bits, keep_probability, mask_, masked
from mmpeft_fast.ops.prologue import prologue_backward, prologue_forward, prologue_ref
from mmpeft_fast.ops.segments import POSITIONS, Branch, Segment, check_call

# Post branches drop elements of the output, the others of the input: separate Philox streams.
_POST_STREAM = 1 << 16


@dataclass(frozen=True)
class _BranchSpec:
    scaling: float
    activation: str
    position: str
    mask: tuple[float, int] | None  # (p, stream) of the dropout mask, None without dropout


@dataclass(frozen=True)
class _Spec:
    """Everything of a call that is not a tensor."""

    prologue: str
    eps: float
    segments: tuple[tuple[_BranchSpec, ...], ...]


class _Masks:
    """Dropout of one [M, K] operand: masks are generated once a pass and shared by the branches that agree on them."""

    def __init__(self, operand: Tensor, seed: Tensor | None):
        self._operand, self._seed, self._masks, self._operands = operand, seed, {}, {}

    def _mask(self, key: tuple[float, int]) -> Tensor:
        if key not in self._masks:
            rows, cols = self._operand.shape
            itemsize = self._operand.element_size()
            self._masks[key] = keep_bits(self._seed, rows, cols, key[0], stream=key[1], itemsize=itemsize)
        return self._masks[key]

    def apply(self, key: tuple[float, int] | None) -> Tensor:
        """The operand with elements dropped; the factor 1 / keep_probability is left to the rank-sized side."""
        if key is None:
            return self._operand
        if key not in self._operands:
            self._operands[key] = masked(self._operand, self._mask(key))
        return self._operands[key]

    def add_product_(self, out: Tensor, key: tuple[float, int] | None, da: Tensor, down: Tensor) -> None:
        """out += mask * (da down) / keep_probability, in place: the backward of `apply` followed by the shrink."""
        if key is None:
            out.addmm_(da, down)
        else:
            product = _scaled_mm(da, down, 1.0 / keep_probability(key[0]))
            out.add_(mask_(product, self._mask(key)))


def _scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha * a b, scaled in the GEMM's accumulator: one rounding and no pass of its own."""
    return a @ b if alpha == 1.0 else torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=alpha)


def _inverse_keep(spec: _BranchSpec) -> float:
    return 1.0 if spec.mask is None else 1.0 / keep_probability(spec.mask[0])


def _shrink(masks: _Masks, specs: Sequence[_BranchSpec], downs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """a = drop(h) D^T [M, R] of each branch; branches that share a mask share one GEMM."""
    groups: dict[tuple[float, int] | None, list[int]] = {}
    for i, spec in enumerate(specs):
        groups.setdefault(spec.mask, []).append(i)
    a: list[Tensor | None] = [None] * len(specs)
    for key, members in groups.items():
        stacked = torch.cat([downs[i] for i in members]).to(dtype) if len(members) > 1 else downs[members[0]].to(dtype)
        product = _scaled_mm(masks.apply(key), stacked.t(), _inverse_keep(specs[members[0]]))
        for i, part in zip(members, product.split([downs[i].shape[0] for i in members], dim=1), strict=True):
            a[i] = part
    return a


class _FusedLinear(torch.autograd.Function):
    """Arguments after `spec`: residual, gain, in_scale, seed, the inputs (one or two), then for each segment
    weight, bias, out_scale and a (down, up) pair for each branch."""

    @staticmethod
    def forward(ctx, spec: _Spec, residual, gain, in_scale, seed, *tensors):
        num_inputs = 2 if spec.prologue == "swiglu" else 1
        x, rest = tensors[:num_inputs], tensors[num_inputs:]
        dtype = x[0].dtype
        h, rstd = prologue_forward(spec.prologue, x, gain, spec.eps, in_scale)
        masks = _Masks(h, seed)

        need = _Needs(ctx.needs_input_grad, spec, num_inputs)
        segments = list(_unpack(spec, rest))
        inner = [(branch, down) for seg in segments for branch, down, _ in seg.branches if branch.position != "post"]
        a_inner = _shrink(masks, [branch for branch, _ in inner], [down for _, down in inner], dtype)
        del masks
        remaining = iter(a_inner)
        outputs, a_post, before_scale, before_post = [], [], [], []
        for seg, wants in zip(segments, need.segments, strict=True):
            z = [
                (branch, up, ACTIVATIONS[branch.activation].function(next(remaining)))
                for branch, _, up in seg.branches
                if branch.position != "post"
            ]
            post = [(branch, down, up) for branch, down, up in seg.branches if branch.position == "post"]
            operand = _pre_operand(h, z)
            plain = seg.out_scale is None and not post
            if residual is not None and plain and seg.bias is None:
                y = torch.addmm(residual, operand, seg.weight.t())
                added_residual = True
            else:
                y = torch.addmm(seg.bias, operand, seg.weight.t()) if seg.bias is not None else operand @ seg.weight.t()
                added_residual = residual is None
            for branch, up, z_branch in z:
                if branch.position == "parallel":
                    y.addmm_(z_branch, up.to(dtype).t(), alpha=branch.scaling)
            if seg.out_scale is not None:
                before_scale.append(y if wants.out_scale else None)
                y = (y * seg.out_scale).to(dtype)
            if post:
                before_post.append(y if any(want.down for want in wants.branches) else None)
                a = _shrink(_Masks(y, seed), [branch for branch, _, _ in post], [down for _, down, _ in post], dtype)
                a_post += a
                y = y.clone()
                for (branch, _, up), a_branch in zip(post, a, strict=True):
                    z_branch = ACTIVATIONS[branch.activation].function(a_branch)
                    y.addmm_(z_branch, up.to(dtype).t(), alpha=branch.scaling)
            if not added_residual:
                y.add_(residual)
            outputs.append(y)

        ctx.spec = spec
        ctx.num_inputs = num_inputs
        # x only matters where h is needed again or the prologue is differentiated; nothing is kept for frozen parts.
        keep_x = need.h or need.in_scale or (need.dh and spec.prologue != "none")
        ctx.save_for_backward(
            gain,
            in_scale,
            seed,
            rstd if keep_x else None,
            *(x if keep_x else (None,) * num_inputs),
            *rest,
            *a_inner,
            *a_post,
            *before_scale,
            *before_post,
        )
        ctx.num_rest, ctx.num_inner, ctx.num_post = len(rest), len(a_inner), len(a_post)
        ctx.num_scaled = len(before_scale)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        spec, num_inputs = ctx.spec, ctx.num_inputs
        need = _Needs(ctx.needs_input_grad, spec, num_inputs)
        gain, in_scale, seed, rstd, *saved = ctx.saved_tensors
        x, saved = tuple(saved[:num_inputs]), saved[num_inputs:]
        rest, saved = saved[: ctx.num_rest], saved[ctx.num_rest :]
        a_inner, saved = iter(saved[: ctx.num_inner]), saved[ctx.num_inner :]
        a_post, saved = iter(saved[: ctx.num_post]), saved[ctx.num_post :]
        before_scale, before_post = iter(saved[: ctx.num_scaled]), iter(saved[ctx.num_scaled :])

        dresidual = dys[0] if need.residual else None
        h = None
        if need.h:
            h, _ = prologue_forward(spec.prologue, x, gain, spec.eps, in_scale, rstd)
        masks = _Masks(h, seed) if need.h else None

        grads: list[Tensor | None] = []  # aligned with `rest`
        dh = None
        shrunk: list[tuple[_BranchSpec, Tensor, Tensor, int]] = []  # inner branches: spec, down, da, index in grads
        for seg, wants, dy in zip(_unpack(spec, rest), need.segments, dys, strict=True):
            branches = list(zip(seg.branches, wants.branches, strict=True))
            dtype = dy.dtype
            branch_grads: dict[int, tuple[Tensor | None, Tensor | None]] = {}

            post = [(i, item, want) for i, (item, want) in enumerate(branches) if item[0].position == "post"]
            if post:
                z0 = next(before_post)
                post_masks = _Masks(dy if z0 is None else z0, seed)
                dz0 = dy.clone()
                for i, (branch, down, up), want in post:
                    da, dup = _expand_backward(branch, up, next(a_post), dy, want)
                    ddown = None
                    if want.down:
                        ddown = _scaled_mm(da.t(), post_masks.apply(branch.mask), _inverse_keep(branch)).to(down.dtype)
                    post_masks.add_product_(dz0, branch.mask, da, down.to(dtype))
                    branch_grads[i] = (ddown, dup)
                dy = dz0
            dout_scale = None
            if seg.out_scale is not None:
                y0 = next(before_scale)
                if wants.out_scale:
                    dout_scale = (dy.to(seg.out_scale.dtype) * y0).sum(0).to(seg.out_scale.dtype)
                dy = (dy * seg.out_scale).to(dtype)

            inner = [(i, item, want) for i, (item, want) in enumerate(branches) if item[0].position != "post"]
            a = [next(a_inner) for _ in inner]
            has_pre = any(branch.position == "pre" for _, (branch, _, _), _ in inner)
            dweight = None
            if wants.weight:
                z = [
                    (branch, up, ACTIVATIONS[branch.activation].function(a_branch))
                    for (_, (branch, _, up), _), a_branch in zip(inner, a, strict=True)
                ]
                dweight = dy.t() @ _pre_operand(h, z)
            dbias = dy.sum(0).to(seg.bias.dtype) if wants.bias else None
            doperand = None
            if has_pre:
                doperand = dy @ seg.weight
                if need.dh:
                    dh = doperand if dh is None else dh.add_(doperand)
            elif need.dh:
                dh = dy @ seg.weight if dh is None else dh.addmm_(dy, seg.weight)
            start = len(grads) + 3
            for (i, (branch, down, up), want), a_branch in zip(inner, a, strict=True):
                above = doperand if branch.position == "pre" else dy
                da, dup = _expand_backward(branch, up, a_branch, above, want, need_da=want.down or need.dh)
                branch_grads[i] = (None, dup)
                if da is not None:
                    shrunk.append((branch, down, da, start + 2 * i))
            grads += [dweight, dbias, dout_scale]
            for i in range(len(branches)):
                grads += branch_grads[i]

        wants_down = {index for index, _, wanted in need.downs if wanted}
        for branch, down, da, index in shrunk:
            if index in wants_down:
                grads[index] = _scaled_mm(da.t(), masks.apply(branch.mask), _inverse_keep(branch)).to(down.dtype)
        if need.dh:
            # Without h in memory a mask still needs its shape: [M, K] is that of dh.
            masks = masks or _Masks(dh, seed)
            for branch, down, da, _ in shrunk:
                masks.add_product_(dh, branch.mask, da, down.to(dh.dtype))
        del masks, h

        dx, dgain, din_scale = (None,) * num_inputs, None, None
        if need.dh:
            dx, dgain, din_scale = prologue_backward(
                spec.prologue,
                dh,
                x,
                gain,
                spec.eps,
                in_scale,
                rstd,
                need_dx=need.x,
                need_dgain=need.gain,
                need_din_scale=need.in_scale,
            )
        return None, dresidual, dgain, din_scale, None, *dx, *grads


class _UnpackedSegment(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    out_scale: Tensor | None
    branches: list[tuple[_BranchSpec, Tensor, Tensor]]  # spec, down, up


def _unpack(spec: _Spec, tensors: Sequence[Tensor | None]):
    position = 0
    for branches in spec.segments:
        pairs = tensors[position + 3 : position + 3 + 2 * len(branches)]
        yield _UnpackedSegment(
            *tensors[position : position + 3], list(zip(branches, pairs[::2], pairs[1::2], strict=True))
        )
        position += 3 + 2 * len(branches)


class _WantedBranch(NamedTuple):
    down: bool
    up: bool


class _WantedSegment(NamedTuple):
    weight: bool
    bias: bool
    out_scale: bool
    branches: list[_WantedBranch]


class _Needs:
    """Which gradients a backward has to produce, and which intermediate values those need."""

    def __init__(self, flags: Sequence[bool], spec: _Spec, num_inputs: int):
        _, self.residual, self.gain, self.in_scale, _ = flags[:5]
        self.x = tuple(flags[5 : 5 + num_inputs])
        rest = flags[5 + num_inputs :]
        self.segments: list[_WantedSegment] = []
        self.downs: list[tuple[int, _BranchSpec, bool]] = []  # position in `rest`, spec, wanted
        position = 0
        for branches in spec.segments:
            pairs = rest[position + 3 : position + 3 + 2 * len(branches)]
            wanted = [_WantedBranch(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
            self.segments.append(_WantedSegment(*rest[position : position + 3], wanted))
            for i, branch in enumerate(branches):
                if branch.position != "post":
                    self.downs.append((position + 3 + 2 * i, branch, wanted[i].down))
            position += 3 + 2 * len(branches)
        self.dh = any(self.x) or self.gain or self.in_scale
        self.h = any(wanted for _, _, wanted in self.downs) or any(seg.weight for seg in self.segments)


def _pre_operand(h: Tensor, z: Sequence[tuple[_BranchSpec, Tensor, Tensor]]) -> Tensor:
    """h plus the pre branches' contributions [M, K]; h itself where there are none."""
    operand = h
    for branch, up, z_branch in z:
        if branch.position == "pre":
            operand = torch.addmm(operand, z_branch, up.to(h.dtype).t(), alpha=branch.scaling)
    return operand


def _expand_backward(
    branch: _BranchSpec, up: Tensor, a: Tensor, dy: Tensor, want: _WantedBranch, *, need_da: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """da [M, R] and dU of `s U f(a)` from one read of dy; `dy` is the gradient of what U adds to."""
    da = dup = None
    if need_da:
        da = activation_backward(branch.activation, _scaled_mm(dy, up.to(dy.dtype), branch.scaling), a)
    if want.up:
        z = ACTIVATIONS[branch.activation].function(a)
        dup = _scaled_mm(dy.t(), z, branch.scaling).to(up.dtype)
    return da, dup


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

    Returns:
        y [..., N] in x's dtype, or a tuple with one such tensor a segment.

    Raises:
        ValueError: shapes, dtypes or options do not fit; the message has the expectation and what came.
    """
    x = x if isinstance(x, tuple) else (x,)
    check_call(x, segments, prologue, gain, in_scale, residual)
    specs = tuple(
        tuple(
            _BranchSpec(
                scaling=branch.scaling,
                activation=branch.activation,
                position=branch.position,
                mask=(
                    (branch.dropout, branch.stream + (_POST_STREAM if branch.position == "post" else 0))
                    if round(branch.dropout * 65536) > 0
                    else None
                ),
            )
            for branch in seg.branches
        )
        for seg in segments
    )
    if seed is None and any(spec.mask is not None for branches in specs for spec in branches):
        seed = draw_seed(x[0].device)
    lead = x[0].shape[:-1]
    tensors = [part.reshape(-1, part.shape[-1]) for part in x]
    for seg in segments:
        tensors += [seg.weight, seg.bias, seg.out_scale]
        for branch in seg.branches:
            tensors += [branch.down, branch.up]
    flat_residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
    y = _FusedLinear.apply(_Spec(prologue, eps, specs), flat_residual, gain, in_scale, seed, *tensors)
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
) -> tuple[Tensor, ...]:
    """The definition of `fused_linear` in plain differentiable torch; always a tuple. No `seed`: torch's dropout."""
    x = x if isinstance(x, tuple) else (x,)
    h = prologue_ref(prologue, x, gain, eps, in_scale)

    def contribution(branch: Branch, operand: Tensor) -> Tensor:
        stream = branch.stream + (_POST_STREAM if branch.position == "post" else 0)
        kept = dropout_ref(operand, seed, branch.dropout, stream=stream)
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

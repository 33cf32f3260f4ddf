"""The torch provider of the fused linear: library GEMMs, `addmm` for the low-rank part, plain elementwise torch.

Always there, on every device; what other providers are measured and tested against.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft_fast.ops.activations import ACTIVATIONS, activation_backward
from mmpeft_fast.ops.dropout import keep_bits, keep_probability, mask_, masked
from mmpeft_fast.ops.fused_call import (
    Call,
    CallBranch,
    CallSegment,
    Grads,
    Kept,
    MaskKey,
    Needs,
    SegmentGrads,
    WantedBranch,
    WantedSegment,
)
from mmpeft_fast.ops.prologue import PrologueGrads, prologue_backward, prologue_forward, prologue_recompute


class _Masks:
    """Dropout of one [M, K] operand: masks are generated once a pass and shared by the branches that agree on them."""

    def __init__(self, operand: Tensor, seed: Tensor | None):
        self._operand, self._seed, self._masks, self._operands = operand, seed, {}, {}

    def _mask(self, key: MaskKey) -> Tensor:
        if key not in self._masks:
            rows, cols = self._operand.shape
            itemsize = self._operand.element_size()
            self._masks[key] = keep_bits(self._seed, rows, cols, key[0], stream=key[1], itemsize=itemsize)
        return self._masks[key]

    def apply(self, key: MaskKey | None) -> Tensor:
        """The operand with elements dropped; the factor 1 / keep_probability is left to the rank-sized side."""
        if key is None:
            return self._operand
        if key not in self._operands:
            self._operands[key] = masked(self._operand, self._mask(key))
        return self._operands[key]

    def add_product_(self, out: Tensor, key: MaskKey | None, da: Tensor, down: Tensor) -> None:
        """out += mask * (da down) / keep_probability, in place: the backward of `apply` followed by the shrink."""
        down = down.to(out.dtype)
        if key is None:
            out.addmm_(da, down)
        else:
            out.add_(mask_(_scaled_mm(da, down, 1.0 / keep_probability(key[0])), self._mask(key)))


def _scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha * a b, scaled in the GEMM's accumulator: one rounding and no pass of its own."""
    return a @ b if alpha == 1.0 else torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=alpha)


def _shrink(masks: _Masks, branches: Sequence[CallBranch], dtype: torch.dtype) -> list[Tensor]:
    """a = drop(h) D^T [M, R] of each branch; branches that share a mask share one GEMM."""
    groups: dict[MaskKey | None, list[int]] = {}
    for i, branch in enumerate(branches):
        groups.setdefault(branch.spec.mask, []).append(i)
    a: list[Tensor | None] = [None] * len(branches)
    for key, members in groups.items():
        downs = [branches[i].down for i in members]
        stacked = (torch.cat(downs) if len(downs) > 1 else downs[0]).to(dtype)
        product = _scaled_mm(masks.apply(key), stacked.t(), branches[members[0]].spec.inverse_keep)
        for i, part in zip(members, product.split([down.shape[0] for down in downs], dim=1), strict=True):
            a[i] = part
    return a


def _activate(branch: CallBranch, a: Tensor) -> Tensor:
    return ACTIVATIONS[branch.spec.activation].function(a)


def _expand_(y: Tensor, branch: CallBranch, a: Tensor) -> None:
    """y += s f(a) U^T, in place."""
    y.addmm_(_activate(branch, a), branch.up.to(y.dtype).t(), alpha=branch.spec.scaling)


def _pre_operand(h: Tensor, branches: Sequence[CallBranch], a: Sequence[Tensor]) -> Tensor:
    """h plus the pre branches' contributions [M, K]; h itself where there are none."""
    for branch, a_branch in zip(branches, a, strict=True):
        if branch.spec.position == "pre":
            up = branch.up.to(h.dtype)
            h = torch.addmm(h, _activate(branch, a_branch), up.t(), alpha=branch.spec.scaling)
    return h


def forward(call: Call, need: Needs) -> tuple[list[Tensor], Kept]:
    """The outputs [M, N_i] of the segments, and what `backward` needs."""
    h, rstd = prologue_forward(call.spec.prologue, call.x, call.gain, call.spec.eps, call.in_scale)
    dtype = h.dtype
    inner = [branch for seg in call.segments for branch in seg.inner]
    a_inner = _shrink(_Masks(h, call.seed), inner, dtype)
    kept = Kept(rstd if need.kept_x else None, a_inner, [], [], [])
    outputs, remaining = [], iter(a_inner)
    for seg, wants in zip(call.segments, need.segments, strict=True):
        a = [next(remaining) for _ in seg.inner]
        operand = _pre_operand(h, seg.inner, a)
        residual = call.residual
        if residual is not None and seg.bias is None and seg.out_scale is None and not seg.post:
            y, residual = torch.addmm(residual, operand, seg.weight.t()), None
        elif seg.bias is not None:
            y = torch.addmm(seg.bias, operand, seg.weight.t())
        else:
            y = operand @ seg.weight.t()
        for branch, a_branch in zip(seg.inner, a, strict=True):
            if branch.spec.position == "parallel":
                _expand_(y, branch, a_branch)
        if seg.out_scale is not None:
            kept.before_scale.append(y if wants.out_scale else None)
            y = (y * seg.out_scale).to(dtype)
        if seg.post:
            kept.before_post.append(y if any(want.down for want in wants.branches) else None)
            a_post = _shrink(_Masks(y, call.seed), seg.post, dtype)
            kept.a_post.extend(a_post)
            y = y.clone()
            for branch, a_branch in zip(seg.post, a_post, strict=True):
                _expand_(y, branch, a_branch)
        outputs.append(y if residual is None else y.add_(residual))
    return outputs, kept


def _expand_backward(
    branch: CallBranch, a: Tensor, dy: Tensor, want: WantedBranch, *, need_da: bool
) -> tuple[Tensor | None, Tensor | None]:
    """da [M, R] and dU of `s U f(a)` from one read of dy, the gradient of what U adds to."""
    scaling, da, dup = branch.spec.scaling, None, None
    if need_da:
        da = activation_backward(branch.spec.activation, _scaled_mm(dy, branch.up.to(dy.dtype), scaling), a)
    if want.up:
        dup = _scaled_mm(dy.t(), _activate(branch, a), scaling).to(branch.up.dtype)
    return da, dup


def _ddown(masks: _Masks, branch: CallBranch, da: Tensor) -> Tensor:
    """dD = da^T drop(h)."""
    return _scaled_mm(da.t(), masks.apply(branch.spec.mask), branch.spec.inverse_keep).to(branch.down.dtype)


class _Backward:
    """One backward pass: walks the segments, collecting dh and the gradients of everything in them."""

    def __init__(self, call: Call, need: Needs, kept: Kept):
        self.call, self.need, self.kept = call, need, kept
        self.h = self.activated = None
        if need.h:
            spec = call.spec
            self.h, self.activated = prologue_recompute(
                spec.prologue, call.x, call.gain, spec.eps, call.in_scale, kept.rstd
            )
        self.dh: Tensor | None = None
        self.shrunk: list[tuple[CallBranch, Tensor]] = []  # inner branches and their da, for dh
        self._a_inner, self._a_post = iter(kept.a_inner), iter(kept.a_post)
        self._before_scale, self._before_post = iter(kept.before_scale), iter(kept.before_post)
        self._masks = _Masks(self.h, call.seed) if need.h else None

    def segment(self, seg: CallSegment, wants: WantedSegment, dy: Tensor) -> SegmentGrads:
        """Gradients of one segment's own tensors; adds its share to dh and shrunk."""
        branch_grads = {}
        if seg.post:
            dy = self._post(seg, wants, dy, branch_grads)
        dout_scale = None
        if seg.out_scale is not None:
            before = next(self._before_scale)
            if wants.out_scale:
                dout_scale = (dy.to(seg.out_scale.dtype) * before).sum(0).to(seg.out_scale.dtype)
            dy = (dy * seg.out_scale).to(dy.dtype)
        a = [next(self._a_inner) for _ in seg.inner]
        dweight = dy.t() @ _pre_operand(self.h, seg.inner, a) if wants.weight else None
        dbias = dy.sum(0).to(seg.bias.dtype) if wants.bias else None
        doperand = self._gemm(seg, dy)
        remaining = iter(a)
        for i, (branch, want) in enumerate(zip(seg.branches, wants.branches, strict=True)):
            if branch.is_post:
                continue
            above = doperand if branch.spec.position == "pre" else dy
            da, dup = _expand_backward(branch, next(remaining), above, want, need_da=want.down or self.need.dh)
            branch_grads[i] = (_ddown(self._masks, branch, da) if want.down else None, dup)
            if self.need.dh:
                self.shrunk.append((branch, da))
        return SegmentGrads(dweight, dbias, dout_scale, [branch_grads[i] for i in range(len(seg.branches))])

    def _gemm(self, seg: CallSegment, dy: Tensor) -> Tensor | None:
        """Adds dy W to dh; returns it alone where a pre branch needs it."""
        if any(branch.spec.position == "pre" for branch in seg.inner):
            doperand = dy @ seg.weight
            if self.need.dh:
                self.dh = doperand if self.dh is None else self.dh.add_(doperand)
            return doperand
        if self.need.dh:
            self.dh = dy @ seg.weight if self.dh is None else self.dh.addmm_(dy, seg.weight)
        return None

    def _post(self, seg: CallSegment, wants: WantedSegment, dy: Tensor, branch_grads: dict) -> Tensor:
        """The gradient below the post branches, whose own gradients go to `branch_grads`."""
        before = next(self._before_post)
        masks = _Masks(dy if before is None else before, self.call.seed)  # without `before` only its shape is used
        dbefore = dy.clone()
        for i, (branch, want) in enumerate(zip(seg.branches, wants.branches, strict=True)):
            if not branch.is_post:
                continue
            da, dup = _expand_backward(branch, next(self._a_post), dy, want, need_da=True)
            branch_grads[i] = (_ddown(masks, branch, da) if want.down else None, dup)
            masks.add_product_(dbefore, branch.spec.mask, da, branch.down)
        return dbefore

    def prologue(self) -> PrologueGrads:
        """Adds the low-rank parts to dh and differentiates the prologue."""
        call, need, dh = self.call, self.need, self.dh
        masks = self._masks or _Masks(dh, call.seed)  # without h a mask still needs its shape, which is that of dh
        for branch, da in self.shrunk:
            masks.add_product_(dh, branch.spec.mask, da, branch.down)
        self._masks = self.h = None
        return prologue_backward(
            call.spec.prologue, dh, call.x, call.gain, call.spec.eps, call.in_scale, self.kept.rstd, self.activated,
            need_dx=need.x, need_dgain=need.gain, need_din_scale=need.in_scale,
        )  # fmt: skip


def backward(call: Call, need: Needs, kept: Kept, dys: Sequence[Tensor]) -> Grads:
    """Every gradient that `need` asks for, from dy [M, N_i] of the segments."""
    run = _Backward(call, need, kept)
    segments = [run.segment(*item) for item in zip(call.segments, need.segments, dys, strict=True)]
    dx, dgain, din_scale = run.prologue() if need.dh else ((None,) * len(call.x), None, None)
    return Grads(dys[0] if need.residual else None, dgain, din_scale, dx, segments)

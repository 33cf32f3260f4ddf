"""The order in which a fused linear calls the kernel set, forward and backward; the same for every provider."""

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.ops import layout, stacking
from mmpeft_fast.ops.activations import ACTIVATIONS, accumulate_dtype, activation_backward
from mmpeft_fast.ops.dispatch import SMALL_M
from mmpeft_fast.ops.fused_call import (
    BranchGrads,
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
from mmpeft_fast.ops.kernel_set import LowRank, Mask, PrologueGrads, PrologueSpec, Term

_PLAIN = PrologueSpec("none", None, 0.0, None)


class _Group(NamedTuple):
    """Inner branches that share a mask: one shrink, one masked product. members: their indices among inner branches."""

    low_rank: LowRank
    members: list[int]

    def split(self, stacked: Tensor | None, inner: Sequence[CallBranch], dim: int) -> Iterator[tuple[int, Tensor]]:
        """(index of an inner branch, its part of a tensor that is stacked by ranks)."""
        ranks = [inner[i].down.shape[0] for i in self.members]
        parts = [None] * len(ranks) if stacked is None else stacked.split(ranks, dim=dim)
        return zip(self.members, parts, strict=True)


def _mask(key: MaskKey | None, seed: Tensor | None) -> Mask | None:
    return None if key is None else Mask(key[0], key[1], seed)


def _groups(inner: Sequence[CallBranch], seed: Tensor | None) -> list[_Group]:
    by_mask: dict[MaskKey | None, list[int]] = {}
    for i, branch in enumerate(inner):
        by_mask.setdefault(branch.spec.mask, []).append(i)
    return [
        _Group(LowRank(stacking.rows([inner[i].down for i in members]), _mask(key, seed)), members)
        for key, members in by_mask.items()
    ]


def _by_branch(
    groups: Sequence[_Group], stacked: Sequence[Tensor | None], inner: Sequence[CallBranch]
) -> list[Tensor | None]:
    """a [M, R] of each inner branch from those of its group."""
    a: list[Tensor | None] = [None] * len(inner)
    for group, a_group in zip(groups, stacked, strict=True):
        for i, part in group.split(a_group, inner, 1):
            a[i] = part
    return a


def _prologue_spec(call: Call) -> PrologueSpec:
    return PrologueSpec(call.spec.prologue, call.gain, call.spec.eps, call.in_scale)


def _inner(call: Call) -> list[CallBranch]:
    return [branch for seg in call.segments for branch in seg.inner]


def _terms(branches: Sequence[CallBranch], a: Sequence[Tensor], position: str, start: int, stop: int) -> list[Term]:
    return [
        Term(_z(branch, a_branch), branch.up, branch.spec.scaling, start, stop)
        for branch, a_branch in zip(branches, a, strict=True)
        if branch.spec.position == position
    ]


def by_expert(z: Tensor, gate: Tensor) -> Tensor:
    """z [..., R] times its experts' numbers in gate [..., E], in z's dtype."""
    return (z.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2).to(z.dtype)


def _z(branch: CallBranch, a: Tensor) -> Tensor:
    """What U is applied to [M, R]: f(a), gated."""
    z = ACTIVATIONS[branch.spec.activation].function(a)
    return z if branch.gate is None else by_expert(z, branch.gate)


def _dy_pass(
    kernels,
    dys: Sequence[Tensor],
    a: Sequence[Tensor],
    branches: Sequence[CallBranch],
    wanted: Sequence[WantedBranch],
    need_da: Sequence[bool],
) -> list[tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """(da, dU, dgate) of each branch. Around a gate the kernels see what they know: an identity on the gated z."""
    found = kernels.dy_pass(
        list(dys),
        [part if branch.gate is None else _z(branch, part) for branch, part in zip(branches, a, strict=True)],
        [branch.up for branch in branches],
        scalings=[branch.spec.scaling for branch in branches],
        activations=["identity" if branch.gate is not None else branch.spec.activation for branch in branches],
        need_da=[need or want.gate for need, want in zip(need_da, wanted, strict=True)],
        need_dup=[want.up for want in wanted],
    )
    return [
        (da, dup, None) if branch.gate is None or da is None else _below_gate(branch, want, part, da, dup)
        for da, dup, branch, want, part in zip(*found, branches, wanted, a, strict=True)
    ]


def _below_gate(
    branch: CallBranch, want: WantedBranch, a: Tensor, dgated: Tensor, dup: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(da, dU, dgate) from the gradient dgated [M, R] of the gated z."""
    name, gate, dgate = branch.spec.activation, branch.gate, None
    if want.gate:
        wide = accumulate_dtype(a.dtype)
        products = dgated.to(wide) * ACTIVATIONS[name].function(a.to(wide))
        dgate = products.unflatten(1, (gate.shape[1], -1)).sum(2).to(gate.dtype)
    return activation_backward(name, by_expert(dgated, gate), a), dup, dgate


def _plus(y: Tensor, term: Term) -> Tensor:
    return torch.addmm(y, term.z, term.up.to(y.dtype).t(), alpha=term.scaling)


def _pre_operand(h: Tensor, seg: CallSegment, a: Sequence[Tensor]) -> Tensor:
    """h plus the pre branches' contributions [M, K]; h itself where there are none."""
    for term in _terms(seg.inner, a, "pre", 0, h.shape[1]):
        h = _plus(h, term)
    return h


def may_be_stacked(segments: Sequence[CallSegment]) -> bool:
    """Whether nothing but where their weights lie keeps segments from being one GEMM."""
    if any(seg.out_scale is not None or any(b.spec.position != "parallel" for b in seg.branches) for seg in segments):
        return False
    return len({seg.bias is None for seg in segments}) == 1


def _stacked(segments: Sequence[CallSegment]) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of all segments as one, where they may be stacked and their weights are rows of one buffer."""
    if not may_be_stacked(segments):
        return None
    weight, biases = stacking.as_rows([seg.weight for seg in segments]), [seg.bias for seg in segments]
    if weight is None:
        return None
    return weight, None if biases[0] is None else stacking.rows(biases)


def forward(kernels, call: Call, need: Needs) -> tuple[list[Tensor], Kept]:
    """The outputs [M, N_i] of the segments, and what `backward` needs."""
    inner = _inner(call)
    groups = _groups(inner, call.seed)
    stacked = _stacked(call.segments)
    joint = None if stacked is None else _joint(call, stacked[0], inner, groups)
    place = {} if joint is None else {"h_out": joint.h}
    h, rstd, a_group = kernels.prologue(_prologue_spec(call), call.x, groups[0].low_rank if groups else None, **place)
    a_groups = []
    for group in groups:
        if group is not groups[0]:
            _, _, a_group = kernels.prologue(_PLAIN, (h,), group.low_rank, need_h=False)
        a_groups.append(a_group)
    a = _by_branch(groups, a_groups, inner)
    kept = Kept(rstd if need.kept_x else None, a_groups, [], [], [])
    if stacked is not None:
        return _stacked_outputs(kernels, call, h, a, joint, *stacked), kept
    remaining, outputs = iter(a), []
    for seg, wants in zip(call.segments, need.segments, strict=True):
        outputs.append(_output(kernels, call, seg, wants, h, [next(remaining) for _ in seg.inner], kept))
    return outputs, kept


def _joint(call: Call, weight: Tensor, inner: Sequence[CallBranch], groups: Sequence[_Group]) -> layout.Joint | None:
    """Buffers of the layout realisation, where the weight has the columns and the prologue writes h anyway."""
    spare = layout.spare_columns(call.segments[0].weight)
    num_rows, rank = call.x[0].shape[0], sum(branch.down.shape[0] for branch in inner)
    writes_h = call.spec.prologue != "none" or call.in_scale is not None
    if len(groups) != 1 or not writes_h or not rank <= spare or num_rows < SMALL_M:
        return None
    return layout.joint(weight, spare, num_rows)


def _stacked_outputs(
    kernels,
    call: Call,
    h: Tensor,
    a: Sequence[Tensor],
    joint: layout.Joint | None,
    weight: Tensor,
    bias: Tensor | None,
) -> list[Tensor]:
    terms, widths, remaining = [], [seg.weight.shape[0] for seg in call.segments], iter(a)
    start = 0
    for seg, width in zip(call.segments, widths, strict=True):
        a_seg = [next(remaining) for _ in seg.inner]
        terms += _terms(seg.inner, a_seg, "parallel", start, start + width)
        start += width
    if joint is None:
        y = kernels.lowrank_gemm(h, weight, terms, bias=bias, residual=call.residual)
    else:
        y = layout.multiply(joint, terms, bias=bias, residual=call.residual)
    return [y] if len(widths) == 1 else list(y.split(widths, dim=1))


def _output(
    kernels, call: Call, seg: CallSegment, wants: WantedSegment, h: Tensor, a: Sequence[Tensor], kept: Kept
) -> Tensor:
    """y [M, N] of one segment; adds what its backward needs to `kept`."""
    operand = _pre_operand(h, seg, a)
    terms = _terms(seg.inner, a, "parallel", 0, seg.weight.shape[0])
    is_last = seg.out_scale is None and not seg.post
    y = kernels.lowrank_gemm(operand, seg.weight, terms, bias=seg.bias, residual=call.residual if is_last else None)
    if is_last:
        return y
    if seg.out_scale is not None:
        kept.before_scale.append(y if wants.out_scale else None)
        y = (y * seg.out_scale).to(y.dtype)
        if not seg.post:
            return y if call.residual is None else y.add_(call.residual)
    kept.before_post.append(y if any(want.down for want in wants.branches) else None)
    if len(seg.post) > 1 or seg.post[0].gate is not None:
        return _several_post(kernels, call, seg, y, kept)
    (branch,) = seg.post
    spec = branch.spec
    y, a_post = kernels.post_branch(
        y, branch.down, branch.up, scaling=spec.scaling, activation=spec.activation, mask=_mask(spec.mask, call.seed),
        residual=call.residual,
    )  # fmt: skip
    kept.a_post.append(a_post)
    return y


def _several_post(kernels, call: Call, seg: CallSegment, y: Tensor, kept: Kept) -> Tensor:
    """Post branches all act on y, not on one another: y + sum of their contributions."""
    total = y if call.residual is None else y + call.residual
    for branch in seg.post:
        low_rank = LowRank(branch.down, _mask(branch.spec.mask, call.seed))
        _, _, a = kernels.prologue(_PLAIN, (y,), low_rank, need_h=False)
        kept.a_post.append(a)
        total = _plus(total, Term(_z(branch, a), branch.up, branch.spec.scaling, 0, y.shape[1]))
    return total


class _Backward:
    """One backward pass over the segments of a call."""

    def __init__(self, kernels, call: Call, need: Needs, kept: Kept, joint_dx: bool):
        self.kernels, self.call, self.need, self.kept, self.joint_dx = kernels, call, need, kept, joint_dx
        self.inner = _inner(call)
        self.wanted = [
            want
            for seg, wants in zip(call.segments, need.segments, strict=True)
            for branch, want in zip(seg.branches, wants.branches, strict=True)
            if not branch.is_post
        ]
        groups = _groups(self.inner, call.seed)
        self.a = _by_branch(groups, kept.a_inner, self.inner)
        # Without dh only the masks' groups matter that have a trained D.
        self.groups = [group for group in groups if need.dh or any(self.wanted[i].down for i in group.members)]
        self.needs_da = {i for group in self.groups for i in group.members}
        self.is_in_dh = False  # whether the low-rank parts of dh were added by the GEMM that made it
        self.da: list[Tensor | None] = [None] * len(self.inner)
        self._das: dict[int, Tensor] = {}
        self.dup: list[Tensor | None] = [None] * len(self.inner)
        self.dgate: list[Tensor | None] = [None] * len(self.inner)
        self._before_scale, self._before_post = iter(kept.before_scale), iter(kept.before_post)
        self._a_post = iter(kept.a_post)

    def run(self, dys: Sequence[Tensor], dcarry: Tensor | None) -> Grads:
        call, need = self.call, self.need
        heads, below = [], []  # gradients of a segment's own tensors, and of its GEMM's output
        for seg, wants, dy in zip(call.segments, need.segments, dys, strict=True):
            dy, post = self._below_post(seg, wants, dy) if seg.post else (dy, {})
            dout_scale = None
            if seg.out_scale is not None:
                before = next(self._before_scale)
                if wants.out_scale:
                    dout_scale = (dy.to(seg.out_scale.dtype) * before).sum(0).to(seg.out_scale.dtype)
                dy = (dy * seg.out_scale).to(dy.dtype)
            heads.append((dout_scale, post))
            below.append(dy)
        self._branches(below, "parallel")
        weights = self._weights(below) if any(wants.weight for wants in need.segments) else [None] * len(below)
        dh = self._gemms(below)
        prologue, ddowns = self._prologue(dh, dcarry)
        segments, inner_grads = [], map(BranchGrads, ddowns, self.dup, self.dgate)
        for seg, wants, dy, dweight, (dout_scale, post) in zip(
            call.segments, need.segments, below, weights, heads, strict=True
        ):
            dbias = dy.sum(0).to(seg.bias.dtype) if wants.bias else None
            branches = [post[i] if branch.is_post else next(inner_grads) for i, branch in enumerate(seg.branches)]
            segments.append(SegmentGrads(dweight, dbias, dout_scale, branches))
        residual = dys[0] if need.residual else None
        return Grads(residual, prologue.dgain, prologue.din_scale, prologue.dx, segments)

    def _below_post(self, seg: CallSegment, wants: WantedSegment, dout: Tensor) -> tuple[Tensor, dict]:
        """The gradient below the post branches, and the gradients of these by their place in the segment."""
        posts = [item for item in enumerate(zip(seg.branches, wants.branches, strict=True)) if item[1][0].is_post]
        branches, wanted = [branch for _, (branch, _) in posts], [want for _, (_, want) in posts]
        a = [next(self._a_post) for _ in posts]
        found = _dy_pass(self.kernels, [dout] * len(posts), a, branches, wanted, [True] * len(posts))
        das, dups, dgates = zip(*found, strict=True)
        parts = [LowRank(branch.down, _mask(branch.spec.mask, self.call.seed)) for branch in branches]
        grads = self.kernels.prologue_backward(
            _PLAIN, dout.clone(), (next(self._before_post),), None, low_rank=list(zip(parts, das, strict=True)),
            ddown_wanted=[want.down for want in wanted], need_dx=(True,),
        )  # fmt: skip
        return grads.dx[0], dict(zip((i for i, _ in posts), map(BranchGrads, grads.ddowns, dups, dgates), strict=True))

    def _branches(self, dys: Sequence[Tensor | None], position: str) -> None:
        """da, dU and the gates' gradients of the inner branches at `position`; dys: by segment, what the branches'
        contributions meet."""
        chosen, index = [], 0
        for seg, dy in zip(self.call.segments, dys, strict=True):
            for branch in seg.inner:
                if branch.spec.position == position:
                    chosen.append((index, branch, dy))
                index += 1
        if not chosen:
            return
        indices, branches, dy = zip(*chosen, strict=True)
        found = _dy_pass(
            self.kernels, dy, [self.a[i] for i in indices], branches, [self.wanted[i] for i in indices],
            [i in self.needs_da for i in indices],
        )  # fmt: skip
        for i, grads in zip(indices, found, strict=True):
            self.da[i], self.dup[i], self.dgate[i] = grads

    def _weights(self, dys: Sequence[Tensor]) -> list[Tensor | None]:
        """dW of trained base weights."""
        h, _, _ = self.kernels.prologue(_prologue_spec(self.call), self.call.x, None, rstd=self.kept.rstd)
        remaining, dweights = iter(self.a), []
        for seg, wants, dy in zip(self.call.segments, self.need.segments, dys, strict=True):
            a = [next(remaining) for _ in seg.inner]
            dweights.append(dy.t() @ _pre_operand(h, seg, a) if wants.weight else None)
        return dweights

    def _stacked_da(self, group: _Group) -> Tensor:
        """da [M, sum of ranks] of a group."""
        first = group.members[0]
        if first not in self._das:
            self._das[first] = stacking.columns([self.da[i] for i in group.members])
        return self._das[first]

    def _gemms(self, dys: Sequence[Tensor]) -> Tensor | None:
        """dh, its low-rank parts added where the kernel set says so; also what pre branches need, which add to the
        GEMMs' input."""
        kernels, segments = self.kernels, self.call.segments
        if any(branch.spec.position == "pre" for branch in self.inner):
            doperands = [kernels.lowrank_gemm_dx(dy, seg.weight) for seg, dy in zip(segments, dys, strict=True)]
            self._branches(doperands, "pre")
            dh, *others = doperands
            for doperand in others:
                dh = dh.add_(doperand)
            return dh if self.need.dh else None
        if not self.need.dh:
            return None
        weight = stacking.as_rows([seg.weight for seg in segments])
        dy = None if weight is None else stacking.as_columns(dys)
        pairs = [(dy, weight)] if dy is not None else [(dy, seg.weight) for seg, dy in zip(segments, dys, strict=True)]
        product = {}
        if len(self.groups) == 1:
            (group,) = self.groups
            self.is_in_dh = kernels.adds_in_dx(pairs[0][0], pairs[0][1].shape[1], group.low_rank)
            product = {"low_rank": (group.low_rank, self._stacked_da(group))} if self.is_in_dh else {}
        dh = kernels.lowrank_gemm_dx(*pairs[0], **product)
        for dy, weight in pairs[1:]:
            dh = kernels.lowrank_gemm_dx(dy, weight, into=dh)
        return dh

    def _prologue(self, dh: Tensor | None, dcarry: Tensor | None) -> tuple[PrologueGrads, list[Tensor | None]]:
        """The prologue's gradients with the low-rank parts of dh added, and dD by inner branch."""
        call, need, x = self.call, self.need, self.call.x
        if dh is None and not self.groups:
            return PrologueGrads((dcarry, *(None,) * (len(x) - 1)), None, None, []), [None] * len(self.inner)
        low_rank, ddown_wanted = [], []
        for group in self.groups:
            low_rank.append((group.low_rank, self._stacked_da(group)))
            ddown_wanted.append(any(self.wanted[i].down for i in group.members))
        beside = len(x) == 2 and all(need.x) and (self.joint_dx or stacking.as_columns(x) is not None)
        grads = self.kernels.prologue_backward(
            _prologue_spec(call), dh, x, self.kept.rstd, low_rank=low_rank, ddown_wanted=ddown_wanted,
            need_dx=need.x, need_dgain=need.gain, need_din_scale=need.in_scale,
            dresidual=dcarry if need.x[0] else None, dx_out=stacking.empty_columns(x) if beside else None,
            **({"is_in_dh": True} if self.is_in_dh else {}),
        )  # fmt: skip
        ddowns: list[Tensor | None] = [None] * len(self.inner)
        for group, ddown in zip(self.groups, grads.ddowns, strict=True):
            for i, part in group.split(ddown, self.inner, 0):
                ddowns[i] = part if self.wanted[i].down else None
        return grads, ddowns


def with_plain_rows(x: Tensor) -> Tensor:
    """x [M, N] with unit column stride and rows that do not overlap, copied only where it has not."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


class Runner(NamedTuple):
    """The schedule on one kernel set."""

    kernels: ModuleType

    @property
    def is_taped(self) -> bool:
        """Whether what a call does is recorded (`ops.tape`): not worth it where the host is the device."""
        return self.kernels.IS_TAPED

    def forward(self, call: Call, need: Needs) -> tuple[list[Tensor], Kept]:
        return forward(self.kernels, call, need)

    def backward(
        self,
        call: Call,
        need: Needs,
        kept: Kept,
        dys: Sequence[Tensor],
        dcarry: Tensor | None,
        *,
        joint_dx: bool = False,
    ) -> Grads:
        """Every gradient that `need` asks for, from dy [M, N_i] of the segments and the gradient dcarry [M, K] that x
        gets from elsewhere. joint_dx: two inputs' gradients are columns of one buffer whether or not the inputs are."""
        dys, dcarry = [with_plain_rows(dy) for dy in dys], None if dcarry is None else with_plain_rows(dcarry)
        return _Backward(self.kernels, call, need, kept, joint_dx).run(dys, dcarry)

"""A fused linear call as autograd sees it: what is static, what are tensors, and which gradients are wanted."""

import ast
import functools
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple

from torch import Tensor

from mmpeft_fast.ops.dropout import keep_probability
from mmpeft_fast.ops.segments import Segment

# Post branches drop elements of the output, the others of the input: separate Philox streams. Calls that share a seed
# are kept apart above that.
_POST_STREAM = 1 << 16
_CALL_STREAM = 1 << 20

MaskKey = tuple[float, int]  # dropout probability and Philox stream: what a mask depends on besides seed and shape


@dataclass(frozen=True)
class BranchSpec:
    """A branch without its tensors; `mask` is None without dropout."""

    scaling: float
    activation: str
    position: str
    mask: MaskKey | None

    @property
    def inverse_keep(self) -> float:
        return 1.0 if self.mask is None else 1.0 / keep_probability(self.mask[0])


@dataclass(frozen=True)
class CallSpec:
    """Everything of a call that is not a tensor."""

    prologue: str
    eps: float
    segments: tuple[tuple[BranchSpec, ...], ...]

    def __post_init__(self):
        object.__setattr__(self, "_hash", hash((self.prologue, self.eps, self.segments)))

    def __hash__(self) -> int:  # once, not at every call
        return self._hash

    @property
    def num_inputs(self) -> int:
        return 2 if self.prologue == "swiglu" else 1

    def as_text(self) -> str:
        """The inverse of `spec_from_text`."""
        return repr(astuple(self))


@functools.lru_cache(maxsize=4096)
def spec_from_text(text: str) -> CallSpec:
    prologue, eps, segments = ast.literal_eval(text)
    return CallSpec(prologue, eps, tuple(tuple(BranchSpec(*branch) for branch in branches) for branches in segments))


class CallBranch(NamedTuple):
    down: Tensor
    up: Tensor
    gate: Tensor | None  # [M, E]
    spec: BranchSpec

    @property
    def is_post(self) -> bool:
        return self.spec.position == "post"


class CallSegment(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    out_scale: Tensor | None
    branches: list[CallBranch]

    @property
    def inner(self) -> list[CallBranch]:
        """Branches on the GEMM's input: pre and parallel."""
        return [branch for branch in self.branches if not branch.is_post]

    @property
    def post(self) -> list[CallBranch]:
        return [branch for branch in self.branches if branch.is_post]


class Call(NamedTuple):
    """x: one [M, K] tensor, two for swiglu (None where the backward does not need them); residual [M, N] or None."""

    spec: CallSpec
    residual: Tensor | None
    gain: Tensor | None
    in_scale: Tensor | None
    seed: Tensor | None
    x: tuple[Tensor | None, ...]
    segments: list[CallSegment]


class Kept(NamedTuple):
    """What a forward pass keeps for its backward besides the call's own tensors.

    rstd [M, 1] of rms_norm; a_inner: a [M, sum R] of the inner branches on one mask, mask after mask; a_post: a [M, R]
    of the post branches in order; before_scale, before_post: y [M, N] of the segments that have a scale or post
    branches, in order, None where no gradient needs it.
    """

    rstd: Tensor | None
    a_inner: list[Tensor]
    a_post: list[Tensor]
    before_scale: list[Tensor | None]
    before_post: list[Tensor | None]


class WantedBranch(NamedTuple):
    down: bool
    up: bool
    gate: bool


class WantedSegment(NamedTuple):
    weight: bool
    bias: bool
    out_scale: bool
    branches: list[WantedBranch]


class BranchGrads(NamedTuple):
    down: Tensor | None
    up: Tensor | None
    gate: Tensor | None = None


class SegmentGrads(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    out_scale: Tensor | None
    branches: list[BranchGrads]


class Grads(NamedTuple):
    residual: Tensor | None
    gain: Tensor | None
    in_scale: Tensor | None
    x: tuple[Tensor | None, ...]
    segments: list[SegmentGrads]


def flatten_segments(segments: Sequence[Segment | CallSegment | SegmentGrads]) -> list[Tensor | None]:
    """Weight, bias, out_scale and down, up, gate of each branch, segment after segment: autograd's order."""
    flat: list[Tensor | None] = []
    for seg in segments:
        flat += [seg.weight, seg.bias, seg.out_scale]
        for branch in seg.branches:
            flat += [branch.down, branch.up, branch.gate]
    return flat


def _grouped(spec: CallSpec, flat: Sequence):
    """The inverse of `flatten_segments`: (branch specs, first three items, a triple a branch) a segment."""
    position = 0
    for branches in spec.segments:
        inside = flat[position + 3 : position + 3 + 3 * len(branches)]
        yield branches, flat[position : position + 3], list(zip(inside[::3], inside[1::3], inside[2::3], strict=True))
        position += 3 + 3 * len(branches)


def unflatten_segments(spec: CallSpec, flat: Sequence[Tensor | None]) -> list[CallSegment]:
    return [
        CallSegment(*head, [CallBranch(*own, branch) for branch, own in zip(branches, triples, strict=True)])
        for branches, head, triples in _grouped(spec, flat)
    ]


def unflatten_grads(spec: CallSpec, flat: Sequence[Tensor | None]) -> list[SegmentGrads]:
    return [SegmentGrads(*head, [BranchGrads(*own) for own in triples]) for _, head, triples in _grouped(spec, flat)]


class Needs:
    """Which gradients a backward has to produce, and which intermediate values those need.

    flags: autograd's `needs_input_grad` from the residual on.
    """

    def __init__(self, flags: Sequence[bool], spec: CallSpec):
        self.flags = tuple(flags)
        self.residual, self.gain, self.in_scale, _ = flags[:4]
        self.x = tuple(flags[4 : 4 + spec.num_inputs])
        self.segments: list[WantedSegment] = []
        trains_down = trains_weight = False
        for branches, head, triples in _grouped(spec, flags[4 + spec.num_inputs :]):
            wanted = WantedSegment(*head, [WantedBranch(*own) for own in triples])
            self.segments.append(wanted)
            trains_weight |= wanted.weight
            trains_down |= any(
                want.down for branch, want in zip(branches, wanted.branches, strict=True) if branch.position != "post"
            )
        self.dh = any(self.x) or self.gain or self.in_scale
        self.h = trains_down or trains_weight
        # x only matters where h is needed again or the prologue is differentiated; frozen parts keep nothing.
        self.kept_x = self.h or self.in_scale or (self.dh and spec.prologue != "none")


def mask_key(dropout: float, stream: int, position: str, call_stream: int = 0) -> MaskKey | None:
    if round(dropout * 65536) == 0:
        return None
    return dropout, stream + (_POST_STREAM if position == "post" else 0) + _CALL_STREAM * call_stream


def call_spec(prologue: str, eps: float, segments: Sequence[Segment], stream: int = 0) -> CallSpec:
    """The same object for equal calls: comparing two of them costs nothing."""
    return _call_spec(
        prologue, eps, tuple([tuple([branch[2:7] for branch in seg.branches]) for seg in segments]), stream
    )


@functools.lru_cache(maxsize=4096)
def _call_spec(prologue: str, eps: float, segments: tuple, stream: int) -> CallSpec:
    """segments: of every branch what is not a tensor."""
    return CallSpec(
        prologue,
        eps,
        tuple(
            tuple(
                BranchSpec(scaling, activation, position, mask_key(dropout, own_stream, position, stream))
                for scaling, activation, position, dropout, own_stream in branches
            )
            for branches in segments
        ),
    )

"""The vocabulary of a fused linear call: segments of a stacked weight, bottleneck branches, and what fits together."""

from typing import NamedTuple

from torch import Tensor

from mmpeft_fast.ops.activations import ACTIVATIONS
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.prologue import PROLOGUES

POSITIONS = ("parallel", "pre", "post")


class Branch(NamedTuple):
    """A bottleneck branch `s U f(D drop(.))` of one segment.

    down: [R, K] (post: [R, N]); up: [N, R] (pre: [K, R]); both trained or frozen. `stream` separates dropout masks:
    branches of one op with equal `dropout` and `stream` share one mask.

    gate: g [..., E], by row and expert, trained or frozen: `s U (g * f(D drop(.)))`, where each of its numbers is that
    of R / E neighbouring rows of D, an expert's. Its leading sizes are broadcast to x's: [B, 1, E] is a gate by sample.
    """

    down: Tensor
    up: Tensor
    scaling: float = 1.0
    activation: str = "identity"
    position: str = "parallel"
    dropout: float = 0.0
    stream: int = 0
    gate: Tensor | None = None


class Segment(NamedTuple):
    """Rows of the stacked weight that share the op's input: weight [N, K]; bias and out_scale [N] or None."""

    weight: Tensor | PackedWeight
    bias: Tensor | None = None
    branches: tuple[Branch, ...] = ()
    out_scale: Tensor | None = None


def check_call(x, segments, prologue, gain, in_scale, residual):
    """Raises ValueError with what was expected and what came; the one place where a call is checked."""

    def fail(expected: str, got: object):
        raise ValueError(f"fused_linear: expected {expected}, got {got}")

    if prologue not in PROLOGUES:
        fail(f"prologue in {PROLOGUES}", repr(prologue))
    if len(x) != (2 if prologue == "swiglu" else 1):
        fail("x = (gate, up) with prologue 'swiglu' and one tensor otherwise", f"{len(x)} tensors with {prologue!r}")
    if any(part.shape != x[0].shape for part in x):
        fail("gate and up of one shape", [list(part.shape) for part in x])
    if not segments:
        fail("at least one segment", "none")
    width, dtype = x[0].shape[-1], x[0].dtype
    if (gain is not None) != (prologue == "rms_norm"):
        fail("a gain with prologue 'rms_norm' and only there", f"prologue {prologue!r}, gain {gain is not None}")
    for name, vector in (("gain", gain), ("in_scale", in_scale)):
        if vector is not None and vector.shape != (width,):
            fail(f"{name} [{width}]", list(vector.shape))
    for i, seg in enumerate(segments):
        if seg.weight.ndim != 2 or seg.weight.shape[1] != width:
            fail(f"weight [N, {width}] in segment {i}", list(seg.weight.shape))
        if seg.weight.dtype not in (dtype, None):
            fail(f"weight of x's dtype {dtype} in segment {i}", seg.weight.dtype)
        num_out = seg.weight.shape[0]
        for name, vector in (("bias", seg.bias), ("out_scale", seg.out_scale)):
            if vector is not None and vector.shape != (num_out,):
                fail(f"{name} [{num_out}] in segment {i}", list(vector.shape))
        for branch in seg.branches:
            if branch.position not in POSITIONS:
                fail(f"branch position in {POSITIONS}", repr(branch.position))
            if branch.activation not in ACTIVATIONS:
                fail(f"activation in {tuple(ACTIVATIONS)}", repr(branch.activation))
            if not 0.0 <= branch.dropout < 1.0:
                fail("dropout in [0, 1)", branch.dropout)
            rank = branch.down.shape[0]
            if branch.gate is not None and (not branch.gate.shape[-1] or rank % branch.gate.shape[-1]):
                fail(f"a gate of experts that divide the rank {rank} in segment {i}", list(branch.gate.shape))
            down_shape = (rank, num_out if branch.position == "post" else width)
            up_shape = (width if branch.position == "pre" else num_out, rank)
            if branch.down.shape != down_shape or branch.up.shape != up_shape:
                fail(
                    f"{branch.position} branch with down {list(down_shape)} and up {list(up_shape)} in segment {i}",
                    f"down {list(branch.down.shape)} and up {list(branch.up.shape)}",
                )
    if residual is not None:
        if len(segments) != 1:
            fail("a residual with exactly one segment", f"{len(segments)} segments")
        if residual.shape != (*x[0].shape[:-1], segments[0].weight.shape[0]) or residual.dtype != dtype:
            fail(
                f"residual {[*x[0].shape[:-1], segments[0].weight.shape[0]]} of {dtype}",
                f"{list(residual.shape)} of {residual.dtype}",
            )

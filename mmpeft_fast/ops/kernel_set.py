"""The kernel set: what a provider implements. One schedule (`fused_linear`, `attention`, `cross_entropy`) calls it.

A provider is a module with the functions below; `kernels_torch` has all of them and is their definition. Where
`unsupported(x)` names a reason, `kernels_torch` takes the call.

    prologue             h = prologue(x), rstd, and a = drop(h) D^T of the branches on one mask
    prologue_backward    dh += mask * (da D), then the gradients of x, gain, input scale and D
    lowrank_gemm         x W^T + bias + residual + the low-rank terms
    lowrank_gemm_dx      dy W + mask * (da D)         adds_in_dx     whether the second term is better added there
    dy_pass              da = s (dy U) * f'(a) and dU = s dy^T f(a), for all segments
    post_branch          y + s f(drop(y) D^T) U^T + residual; its backward is dy_pass and prologue_backward
    heads                scale, head norm and rotation of q, k, v                     heads_backward
    merge_prefix         the prefix part of attention, by log-sum-exp                 prefix_backward
    cross_entropy_       loss of logits, which are replaced by their gradient

All matrices have unit column stride and any row stride; they may be column slices of wider buffers. Nothing that a
kernel gets is written, unless its docstring says so. Elements are rounded to the activations' dtype where eager torch
rounds them; sums run in float32 (float64 for float64). Every result repeats bit by bit.
"""

from typing import NamedTuple

from torch import Tensor

from mmpeft_fast.ops.dropout import keep_probability


class Mask(NamedTuple):
    """Dropout of an [M, K] operand: probability, Philox stream and 0-dim int64 seed (`ops.dropout`)."""

    p: float
    stream: int
    seed: Tensor

    @property
    def inverse_keep(self) -> float:
        return 1.0 / keep_probability(self.p)


class PrologueSpec(NamedTuple):
    """name: none, rms_norm or swiglu; gain [K] and eps of rms_norm; in_scale [K] or None. Any float dtype."""

    name: str
    gain: Tensor | None
    eps: float
    in_scale: Tensor | None


class LowRank(NamedTuple):
    """The branches of one mask, stacked: down [R, K] of any float dtype."""

    down: Tensor
    mask: Mask | None


class Term(NamedTuple):
    """A low-rank product that is added to columns [start, stop) of a GEMM's output: scaling * z up^T.

    z: [M, R] in the activations' dtype; up: [stop - start, R], any float dtype.
    """

    z: Tensor
    up: Tensor
    scaling: float
    start: int
    stop: int


class PrologueGrads(NamedTuple):
    """dx: one tensor an input of the prologue; ddowns: one a low-rank part."""

    dx: tuple[Tensor | None, ...]
    dgain: Tensor | None
    din_scale: Tensor | None
    ddowns: list[Tensor | None]


class HeadTransform(NamedTuple):
    """What happens to one of q, k, v between its GEMM and the softmax, in this order.

    scale: [heads * DH] or None (IA3); gain: [DH] or None (head norm); rotated for q and k.
    """

    scale: Tensor | None = None
    gain: Tensor | None = None


class Rotation(NamedTuple):
    """cos, sin [B or 1, T, DH] for keys; cos_q, sin_q [B or 1, Tq, DH] for queries, the same tensors where the
    queries are all positions."""

    cos: Tensor
    sin: Tensor
    cos_q: Tensor
    sin_q: Tensor

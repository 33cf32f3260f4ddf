"""Every op that is benchmarked: inputs at a shape, and what computes it, by implementation.

`eager` is the op's definition in plain torch, what a stock stack runs; `frozen` is what remains without PEFT.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.ops.attention import attention, attention_ref
from mmpeft_fast.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from mmpeft_fast.ops.fused_linear import fused_linear, fused_linear_ref
from mmpeft_fast.ops.norms import rms_norm_ref
from mmpeft_fast.ops.rms_norm import rms_norm
from mmpeft_fast.ops.segments import Branch, Segment


@dataclass(frozen=True, kw_only=True)
class Shape:
    """M tokens of a sequence of length `length`; widths of the decoder; rank, prefix and dropout of the method."""

    tokens: int = 1024
    length: int = 512
    hidden: int = 1024
    intermediate: int = 2752
    heads: int = 8
    rank: int = 64
    dropout: float = 0.05
    num_virtual_tokens: int = 20
    vocab: int = 8192


@dataclass(frozen=True)
class Case:
    """`forwards` by implementation; each returns tensors to differentiate with respect to `wanted`."""

    forwards: dict[str, Callable[[], tuple[Tensor, ...]]]
    wanted: dict[str, list[Tensor]]

    def run(self, implementation: str) -> None:
        """Forward and backward."""
        outputs = self.forwards[implementation]()
        torch.autograd.grad(outputs, self.wanted[implementation], [torch.ones_like(y) for y in outputs])


class _Maker:
    """Random tensors whose values bfloat16 can hold: the same in every dtype."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.options = {"dtype": dtype, "device": device}

    def _of(self, values: Tensor) -> Tensor:
        return values.bfloat16().to(**self.options)

    def input(self, *shape: int) -> Tensor:
        return self._of(torch.randn(*shape)).requires_grad_()

    def frozen(self, *shape: int) -> Tensor:
        return self._of(torch.randn(*shape) * shape[-1] ** -0.5)

    def uniform(self, *shape: int) -> Tensor:
        return self._of(torch.rand(*shape))

    def branch(self, width: int, num_out: int, shape: Shape, position: str, activation: str = "identity") -> Branch:
        down = self.frozen(shape.rank, num_out if position == "post" else width).requires_grad_()
        up = self.frozen(width if position == "pre" else num_out, shape.rank).requires_grad_()
        return Branch(down, up, 2.0, activation, position, shape.dropout)


def _linear_case(x, segments, *, trained, frozen, **options) -> Case:
    inputs = list(x) if isinstance(x, tuple) else [x]

    def tuple_of(y):
        return y if isinstance(y, tuple) else (y,)

    return Case(
        {
            "fused": lambda: tuple_of(fused_linear(x, segments, **options)),
            "eager": lambda: fused_linear_ref(x, segments, **options),
            "frozen": frozen,
        },
        {"fused": inputs + trained, "eager": inputs + trained, "frozen": inputs},
    )


def _trained(segments: list[Segment]) -> list[Tensor]:
    return [tensor for seg in segments for branch in seg.branches for tensor in (branch.down, branch.up)]


def lora_linear(shape: Shape, make: _Maker) -> Case:
    x, weight = make.input(shape.tokens, shape.hidden), make.frozen(shape.hidden, shape.hidden)
    segments = [Segment(weight, None, (make.branch(shape.hidden, shape.hidden, shape, "parallel"),))]
    return _linear_case(x, segments, trained=_trained(segments), frozen=lambda: (F.linear(x, weight),))


def norm_lora_gate_up(shape: Shape, make: _Maker) -> Case:
    x, gain = make.input(shape.tokens, shape.hidden), torch.ones(shape.hidden, **make.options)
    weights = [make.frozen(shape.intermediate, shape.hidden) for _ in range(2)]
    segments = [
        Segment(weight, None, (make.branch(shape.hidden, shape.intermediate, shape, "parallel"),)) for weight in weights
    ]

    def frozen():
        h = rms_norm_ref(x, gain, 1e-6)
        return tuple(F.linear(h, weight) for weight in weights)

    return _linear_case(x, segments, trained=_trained(segments), frozen=frozen, prologue="rms_norm", gain=gain)


def _swiglu_down(shape: Shape, make: _Maker, branch_position: str | None, activation: str, scaled: bool) -> Case:
    gate, up = (make.input(shape.tokens, shape.intermediate) for _ in range(2))
    weight, residual = make.frozen(shape.hidden, shape.intermediate), make.input(shape.tokens, shape.hidden)
    branches = ()
    if branch_position:
        branches = (make.branch(shape.intermediate, shape.hidden, shape, branch_position, activation),)
    segments = [Segment(weight, None, branches)]
    in_scale = torch.ones(shape.intermediate, **make.options).requires_grad_() if scaled else None
    case = _linear_case(
        (gate, up),
        segments,
        trained=[*_trained(segments), *([in_scale] if scaled else []), residual],
        frozen=lambda: (residual + F.linear(F.silu(gate) * up, weight),),
        prologue="swiglu",
        residual=residual,
        in_scale=in_scale,
    )
    case.wanted["frozen"].append(residual)
    return case


def swiglu_lora_down(shape: Shape, make: _Maker) -> Case:
    return _swiglu_down(shape, make, "parallel", "identity", scaled=False)


def swiglu_ia3_down(shape: Shape, make: _Maker) -> Case:
    return _swiglu_down(shape, make, None, "identity", scaled=True)


def swiglu_adapter_down(shape: Shape, make: _Maker) -> Case:
    return _swiglu_down(shape, make, "post", "tanh", scaled=False)


def prefix_attention(shape: Shape, make: _Maker) -> Case:
    batch, head_dim = shape.tokens // shape.length, shape.hidden // shape.heads
    qkv = [make.input(batch, shape.length, shape.hidden) for _ in range(3)]
    cos, sin = (make.uniform(1, shape.length, head_dim) for _ in range(2))
    prefix = tuple(make.input(shape.heads, shape.num_virtual_tokens, head_dim) for _ in range(2))
    options = {"head_dim": head_dim}
    return Case(
        {
            "fused": lambda: (attention(*qkv, cos, sin, prefix=prefix, **options),),
            "eager": lambda: (attention_ref(*qkv, cos, sin, prefix=prefix, **options),),
            "frozen": lambda: (attention_ref(*qkv, cos, sin, **options),),
        },
        {"fused": [*qkv, *prefix], "eager": [*qkv, *prefix], "frozen": qkv},
    )


def norm(shape: Shape, make: _Maker) -> Case:
    x, gain = make.input(shape.tokens, shape.hidden), torch.ones(shape.hidden, **make.options).requires_grad_()
    return Case(
        {
            "fused": lambda: (rms_norm(x, gain, 1e-6),),
            "eager": lambda: (rms_norm_ref(x, gain, 1e-6),),
            "frozen": lambda: (rms_norm_ref(x, gain.detach(), 1e-6),),
        },
        {"fused": [x, gain], "eager": [x, gain], "frozen": [x]},
    )


def loss(shape: Shape, make: _Maker) -> Case:
    x, weight = make.input(shape.tokens, shape.hidden), make.frozen(shape.vocab, shape.hidden)
    labels = torch.randint(0, shape.vocab, (shape.tokens,)).to(x.device)
    labels[: shape.tokens * 19 // 20] = IGNORE_INDEX
    rows = slice(shape.tokens * 19 // 20, None)
    return Case(
        {
            "fused": lambda: (linear_cross_entropy(x[rows], weight, labels[rows]),),
            "eager": lambda: (linear_cross_entropy_ref(x, weight, labels),),
            "frozen": lambda: (linear_cross_entropy_ref(x, weight, labels),),
        },
        {name: [x] for name in ("fused", "eager", "frozen")},
    )


OPS: dict[str, Callable[[Shape, _Maker], Case]] = {
    function.__name__: function
    for function in (
        lora_linear,
        norm_lora_gate_up,
        swiglu_lora_down,
        swiglu_ia3_down,
        swiglu_adapter_down,
        prefix_attention,
        norm,
        loss,
    )
}


def make_case(name: str, shape: Shape, *, dtype: torch.dtype, device: str = "cpu") -> Case:
    """The case `name` at a shape; random inputs from seed 0."""
    torch.manual_seed(0)
    return OPS[name](shape, _Maker(dtype, device))

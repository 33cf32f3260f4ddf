"""The ops as functions, for people who hold the tensors themselves. Every function is differentiable once.

Weights are usually frozen; whatever requires grad gets its gradient. PEFT tensors may have a wider dtype than x.
`seed` is a 0-dim int64 tensor that fixes the dropout mask; drawn from torch's generator where it is None.
"""

from torch import Tensor

from mmpeft_fast.ops.attention import HeadTransform, attention
from mmpeft_fast.ops.cross_entropy import linear_cross_entropy
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.ops.rms_norm import rms_norm
from mmpeft_fast.ops.rotary import rotary_cos_sin
from mmpeft_fast.ops.segments import Branch, Segment

__all__ = [
    "Branch",
    "HeadTransform",
    "Segment",
    "adapter_linear",
    "attention",
    "fused_linear",
    "ia3_linear",
    "linear_cross_entropy",
    "lora_linear",
    "prefix_attention",
    "rms_norm",
    "rotary_cos_sin",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """W x + b + scaling U D drop(x) + residual (LoRA, Hu et al. 2021, eq. 3).

    Args:
        x: [..., K]. weight: [N, K] and bias: [N], in x's dtype. down: [R, K], up: [N, R].
        scaling: alpha / r. dropout: in [0, 1). residual: [..., N] in x's dtype.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    branch = Branch(down, up, scaling, dropout=dropout)
    return fused_linear(x, [Segment(weight, bias, (branch,))], seed=seed, residual=residual)


def ia3_linear(
    x: Tensor, weight: Tensor, scale: Tensor, *, where: str = "output", bias: Tensor | None = None
) -> Tensor:
    """(W x + b) * scale with `where="output"`, W (x * scale) + b with `where="input"` (IA3, Liu et al. 2022).

    Args:
        x: [..., K]. weight: [N, K] and bias: [N], in x's dtype. scale: [N] or, on the input, [K].

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: another `where`; shapes or dtypes do not fit.
    """
    if where not in ("input", "output"):
        raise ValueError(f"ia3_linear: expected where in ['input', 'output'], got {where!r}")
    if where == "input":
        return fused_linear(x, [Segment(weight, bias)], in_scale=scale)
    return fused_linear(x, [Segment(weight, bias, out_scale=scale)])


def adapter_linear(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    activation: str = "tanh",
    position: str = "post",
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A linear layer with a bottleneck s U f(D drop(.)) behind ("post"), before ("pre") or beside it ("parallel").

    Args:
        x: [..., K]. weight: [N, K] and bias: [N], in x's dtype.
        down: [R, K] (post: [R, N]), up: [N, R] (pre: [K, R]).
        activation: f, by name. scaling: s. dropout: in [0, 1). residual: [..., N] in x's dtype, added last.

    Returns:
        [..., N] in x's dtype.

    Raises:
        ValueError: shapes, dtypes, position or activation do not fit.
    """
    branch = Branch(down, up, scaling, activation, position, dropout)
    return fused_linear(x, [Segment(weight, bias, (branch,))], seed=seed, residual=residual)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Causal attention over raw projections whose queries also see P trained keys and values (Li & Liang 2021).

    Args:
        q: [B, T, H * DH]; k, v: [B, T, HK * DH]. cos, sin: [B or 1, T, DH]. prefix_k, prefix_v:
            [HK, P, DH], not rotated.
        scale: of the scores; DH ** -0.5 when None. mask: as in `attention`.

    Returns:
        [B, T, H * DH] in q's dtype.

    Raises:
        ValueError: widths do not fit.
    """
    head_dim, prefix = prefix_k.shape[-1], (prefix_k, prefix_v)
    return attention(q, k, v, cos, sin, head_dim=head_dim, scale=scale, mask=mask, prefix=prefix)

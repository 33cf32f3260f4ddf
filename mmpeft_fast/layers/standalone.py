"""Modules for people who build their own models: a frozen linear layer with one PEFT method, computed by one fused op.

LoRALinear      y = W x + b + s U D drop(x)                              (Hu et al. 2021, eq. 3)
IA3Linear       y = (W x + b) * l   or   y = W (x * l) + b               (Liu et al. 2022, section 3.3)
AdapterLinear   y = z + s U f(D drop z), z = W x + b, or before W, or beside it   (Houlsby et al. 2019)
RMSNorm         y = x / rms(x) * gain                                    (Zhang & Sennrich 2019, eq. 4)
PrefixAttention causal attention over trained prefix keys and values     (Li & Liang 2021)
"""

import math

import torch
from torch import Tensor, nn

from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.layers.sites import read_peft_linear, register_linear
from mmpeft_fast.ops.activations import ACTIVATIONS, accumulate_dtype
from mmpeft_fast.ops.attention import attention
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.ops.rms_norm import rms_norm
from mmpeft_fast.ops.segments import POSITIONS
from mmpeft_fast.placement import INITS, BranchPlacement

__all__ = ["AdapterLinear", "IA3Linear", "LoRALinear", "PrefixAttention", "RMSNorm"]


class _FusedPeftLinear(PeftLinear):
    """`weight` [N, K] and `bias` [N] are frozen; what a subclass adds is trained, in at least float32."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.carry_nothing()
        self.requires_grad_(False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings) -> "_FusedPeftLinear":
        """The same around an existing layer, whose parameters are taken over (the same objects) and frozen.

        Args: settings: those of the constructor but for the sizes, `bias`, `device` and `dtype`.

        Raises:
            ValueError: not a plain `torch.nn.Linear`, or a setting out of range.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(f"{cls.__name__}: expected a plain torch.nn.Linear, got {type(linear).__name__}")
        has_bias, dtype = linear.bias is not None, linear.weight.dtype
        new = cls(linear.in_features, linear.out_features, bias=has_bias, device="meta", dtype=dtype, **settings)
        new.weight, new.bias = linear.weight, linear.bias
        new.requires_grad_(False)
        # What is trained is made again, where the weight lies.
        placements, new.branches = [branch.placement for branch in new.branches], nn.ModuleList()
        for placement in placements:
            new.add_branch(placement)
        for where, scale in (("input", new.in_scale), ("output", new.out_scale)):
            if scale is not None:
                new.add_scale(where)
        return new.train(linear.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., K] in the weight's dtype -> [..., N], plus `residual` [..., N] where one is given."""
        return fused_linear(x, [self.segment()], in_scale=self.in_scale, residual=residual)


class LoRALinear(_FusedPeftLinear):
    """y = W x + b + s U D drop(x), s = alpha / r or, rank-stabilised (Kalajdzievski 2023), alpha / sqrt(r).

    Parameters: `weight` [N, K], `bias` [N], frozen; `branches.0.down` D [r, K], Kaiming, and `branches.0.up` U [N, r],
    zero, trained. The dropout mask is regenerated in the backward, never stored.

    Args:
        in_features, out_features: K, N.
        r: rank.
        alpha: numerator of the scaling.
        dropout: on the branch's input while training, in [0, 1).
        rank_stabilized: divides alpha by sqrt(r) instead of r.

    Raises:
        ValueError: r or dropout out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 16,
        alpha: float = 32.0,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        _check("LoRALinear", "r", r, r >= 1, ">= 1")
        _check("LoRALinear", "dropout", dropout, 0 <= dropout < 1, "in [0, 1)")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        scaling = alpha / (math.sqrt(r) if rank_stabilized else r)
        self.add_branch(BranchPlacement(position="parallel", rank=r, scaling=scaling, dropout=dropout))


class IA3Linear(_FusedPeftLinear):
    """y = (W x + b) * l with `where="output"`, y = W (x * l) + b with `where="input"`.

    Parameters: `weight` [N, K], `bias` [N], frozen; `out_scale` [N] or `in_scale` [K], l, ones, trained.

    Args:
        in_features, out_features: K, N.
        where: "output" (attention's k and v) or "input" (the MLP's second layer).

    Raises:
        ValueError: another `where`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        where: str = "output",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        _check("IA3Linear", "where", where, where in ("input", "output"), "in ['input', 'output']")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.add_scale(where)


class AdapterLinear(_FusedPeftLinear):
    """A frozen linear layer with a bottleneck s U f(D drop(.)) behind it, before it or beside it.

    position "post": y = z + s U f(D drop z), z = W x + b;  "pre": y = W (x + s U f(D drop x)) + b;
    "parallel": y = W x + b + s U f(D drop x).

    Parameters: `weight` [N, K], `bias` [N], frozen; `branches.0.down` D [bottleneck, K] (post: [bottleneck, N]) and
    `branches.0.up` U [N, bottleneck] (pre: [K, bottleneck]), trained, N(0, 0.02), or with `init="kaiming"` D Kaiming
    and U zero.

    Args:
        in_features, out_features: K, N.
        bottleneck: width of the bottleneck.
        activation: f, by name: identity, relu, gelu, silu, tanh, ...
        dropout: on the bottleneck's input while training, in [0, 1).
        scaling: s.
        position: "post", "pre" or "parallel".
        init: "bert" or "kaiming".

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bottleneck: int = 64,
        activation: str = "tanh",
        dropout: float = 0.0,
        scaling: float = 1.0,
        position: str = "post",
        init: str = "bert",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        name = "AdapterLinear"
        _check(name, "bottleneck", bottleneck, bottleneck >= 1, ">= 1")
        _check(name, "activation", activation, activation in ACTIVATIONS, f"in {sorted(ACTIVATIONS)}")
        _check(name, "dropout", dropout, 0 <= dropout < 1, "in [0, 1)")
        _check(name, "position", position, position in POSITIONS, f"in {list(POSITIONS)}")
        _check(name, "init", init, init in INITS, f"in {list(INITS)}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        placement = BranchPlacement(
            position=position, rank=bottleneck, scaling=scaling, activation=activation, dropout=dropout, init=init
        )
        self.add_branch(placement)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight; keeps x and one number a row for the backward.

    Parameters: `weight` [K], ones, trained, in at least float32: near 1 a narrower gain cannot take small steps.

    Args:
        hidden_size: K.
        eps: added to the mean square.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        wide = accumulate_dtype(dtype or torch.get_default_dtype())
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=wide))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], any float dtype -> the same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class PrefixAttention(nn.Module):
    """Causal attention whose queries also see P trained keys and values a head; they are not rotated.

    Parameters: `prefix_k`, `prefix_v` [HK, P, DH], N(0, 0.02), trained, in at least float32.

    Args:
        num_heads, num_kv_heads: H and HK, which divides H.
        head_dim: DH.
        num_virtual_tokens: P.

    Raises:
        ValueError: HK does not divide H, or P < 1.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_virtual_tokens: int,
        num_kv_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        name = "PrefixAttention"
        _check(name, "num_virtual_tokens", num_virtual_tokens, num_virtual_tokens >= 1, ">= 1")
        fits = num_kv_heads >= 1 and num_heads % num_kv_heads == 0
        _check(name, "num_kv_heads", num_kv_heads, fits, f"to divide {num_heads} heads")
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        wide = accumulate_dtype(dtype or torch.get_default_dtype())
        shape = (num_kv_heads, num_virtual_tokens, head_dim)
        self.prefix_k = nn.Parameter(torch.empty(shape, device=device, dtype=wide))
        self.prefix_v = nn.Parameter(torch.empty(shape, device=device, dtype=wide))
        nn.init.normal_(self.prefix_k, std=0.02)
        nn.init.normal_(self.prefix_v, std=0.02)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, mask: Tensor | None = None
    ) -> Tensor:
        """Attention over raw projections.

        Args:
            q: [B, T, H * DH]; k, v: [B, T, HK * DH], as their linear layers gave them.
            cos, sin: [B or 1, T, DH], the rotation of q and k; in a model where text positions start behind the prefix,
                of positions P and on.
            mask: None (causal), or [B or 1, 1, T, T] bool (True = may attend) or additive, in place of causality.

        Returns:
            [B, T, H * DH] in q's dtype.

        Raises:
            ValueError: widths do not fit.
        """
        prefix = (self.prefix_k, self.prefix_v)
        return attention(q, k, v, cos, sin, head_dim=self.head_dim, mask=mask, prefix=prefix)

    def extra_repr(self) -> str:
        tokens = self.prefix_k.shape[1]
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, tokens={tokens}"


def _check(name: str, setting: str, value: object, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ValueError(f"{name}: expected {setting} {expected}, got {value!r}")


for _kind in (LoRALinear, IA3Linear, AdapterLinear):
    register_linear(_kind, read_peft_linear, "peft_linear")

"""LoRA linears in the style of two peers, written here for comparison: what they compute and keep, not their code.

unsloth_style: library GEMM, then the branch by `addmm_`; backward by hand, every linear on its own, dy U computed for
dD and again for dx, dx always; no dropout (as in unsloth's fast path).
lorafusion_style: the forward's branch in the GEMM's accumulator; the dropped input and its mask are stored, every
linear on its own (as in LoRAFusion, EuroSys 2026).
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops.kernel_set import Term
from mmpeft_fast.ops.providers import kernel_set


class _UnslothStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scaling):
        y = nn.functional.linear(x, weight, bias)
        y.addmm_(x @ down.t(), up.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, down, up)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, down, up = ctx.saved_tensors
        dup = ctx.scaling * (dy.t() @ (x @ down.t()))
        ddown = ctx.scaling * ((dy @ up).t() @ x)
        dx = (dy @ weight).addmm_(dy @ up, down, alpha=ctx.scaling)
        return dx, None, None, ddown, dup, None


class _LorafusionStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scaling, dropout):
        kernels = kernel_set("fused_linear", x)
        mask, dropped = None, x
        if dropout:
            mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)
            dropped = x * mask / (1 - dropout)
        a = dropped @ down.t()
        y = kernels.lowrank_gemm(x, weight, [Term(a, up, scaling, 0, weight.shape[0])], bias=bias)
        ctx.save_for_backward(dropped, mask, a, weight, down, up)
        ctx.scaling, ctx.dropout, ctx.kernels = scaling, dropout, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dropped, mask, a, weight, down, up = ctx.saved_tensors
        dz = ctx.scaling * (dy @ up)
        dup, ddown = ctx.scaling * (dy.t() @ a), dz.t() @ dropped
        dx = ctx.kernels.lowrank_gemm_dx(dy, weight)
        branch = dz @ down
        dx += branch if mask is None else branch * mask / (1 - ctx.dropout)
        return dx, None, None, ddown, dup, None, None


STYLES = ("unsloth_style", "lorafusion_style")


def linear(style: str, x: Tensor, weight, bias, down, up, *, scaling: float, dropout: float) -> Tensor:
    """x weight^T + bias + scaling drop(x) down^T up^T for x [..., K], all of one dtype."""
    flat = x.reshape(-1, x.shape[-1])
    if style == "unsloth_style":
        y = _UnslothStyle.apply(flat, weight, bias, down, up, scaling)
    else:
        y = _LorafusionStyle.apply(flat, weight, bias, down, up, scaling, dropout)
    return y.view(*x.shape[:-1], y.shape[-1])


class PeerLinear(nn.Linear):
    """A frozen linear layer with a branch in a peer's style; made in place from an `nn.Linear`."""

    @classmethod
    def convert(cls, module: nn.Linear, style: str, *, r: int, scaling: float, dropout: float) -> None:
        module.__class__ = cls
        options = {"dtype": module.weight.dtype, "device": module.weight.device}
        module.down = nn.Parameter(torch.randn(r, module.in_features, **options) * module.in_features**-0.5)
        module.up = nn.Parameter(torch.randn(module.out_features, r, **options) * 0.02)
        module.style, module.scaling, module.dropout = style, scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return linear(self.style, x, self.weight, self.bias, self.down, self.up, scaling=self.scaling, dropout=dropout)

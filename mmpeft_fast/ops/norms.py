"""RMSNorm whose gain is differentiated only when it requires grad, and whose normalised input is never stored.

    rms_norm: y = gain * x * rstd,  rstd = (mean(x^2) + eps)^-1/2          (Zhang & Sennrich 2019, eq. 4)

The product x * rstd is rounded to x's dtype before the gain is applied, as in transformers' LLaMA and Qwen norms.
`layer_norm` is torch's own: its backward already computes only the gradients that are asked for.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import layer_norm

from mmpeft_fast.ops.activations import accumulate_dtype

__all__ = ["layer_norm", "rms_norm", "rms_norm_backward", "rms_norm_forward", "rms_norm_ref"]


def rms_norm_ref(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The definition in plain differentiable torch. x: [..., K]; gain: [K]."""
    wide = x.to(accumulate_dtype(x.dtype))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (gain * normalised.to(x.dtype)).to(x.dtype)


def rms_norm_forward(x: Tensor, gain: Tensor, eps: float, rstd: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y [..., K] and rstd [..., 1] in the accumulation dtype; a known `rstd` is used instead of computed."""
    wide = x.to(accumulate_dtype(x.dtype))
    if rstd is None:
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = (wide * rstd).to(x.dtype)
    # A gain of the same dtype can be applied in place; a wider one (fp32 norms over a bf16 model) cannot.
    return (y.mul_(gain) if gain.dtype == y.dtype else (y * gain).to(x.dtype)), rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, gain: Tensor, rstd: Tensor, *, need_dx: bool, need_dgain: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx [..., K] in x's dtype and dgain [K] in the gain's dtype, each only where asked."""
    wide = accumulate_dtype(x.dtype)
    dy, normalised = dy.to(wide), x.to(wide) * rstd
    dx = dgain = None
    if need_dgain:
        dgain = (dy * normalised).flatten(0, -2).sum(0).to(gain.dtype)
    if need_dx:
        dnormalised = dy * gain.to(wide)
        mean = (dnormalised * normalised).mean(-1, keepdim=True)
        dx = dnormalised.sub_(normalised.mul_(mean)).mul_(rstd).to(x.dtype)
    return dx, dgain


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm_forward(x, gain, eps)
        ctx.save_for_backward(x, gain, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, gain, rstd = ctx.saved_tensors
        need_dx, need_dgain = ctx.needs_input_grad[:2]
        return *rms_norm_backward(dy, x, gain, rstd, need_dx=need_dx, need_dgain=need_dgain), None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation.

    Args:
        x: [..., K], any float dtype.
        gain: [K], the norm's weight, frozen or trained.
        eps: added to the mean square.

    Returns:
        [..., K] in x's dtype.

    Raises:
        ValueError: `gain` is not [K].
    """
    if gain.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: gain must be [{x.shape[-1]}] for x {list(x.shape)}, got {list(gain.shape)}")
    return _RMSNorm.apply(x, gain, eps)

"""RMSNorm in plain torch, forward and backward.

    y = gain * x * rstd,  rstd = (mean(x^2) + eps)^-1/2          (Zhang & Sennrich 2019, eq. 4)

The product x * rstd is rounded to x's dtype before the gain is applied, as in transformers' LLaMA and Qwen norms.
"""

import torch
from torch import Tensor

from mmpeft_fast.ops.activations import accumulate_dtype


def rms_norm_ref(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """The definition in plain differentiable torch. x: [..., K]; gain: [K]."""
    wide = x.to(accumulate_dtype(x.dtype))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (gain * normalised.to(x.dtype)).to(x.dtype)


def rms_norm_forward(
    x: Tensor, gain: Tensor, eps: float, rstd: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y [..., K], in `out` where given, and rstd [..., 1] in the accumulation dtype; a known `rstd` is used instead of
    computed."""
    wide = x.to(accumulate_dtype(x.dtype))
    if rstd is None:
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = rstd.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = (wide * rstd).to(x.dtype)
    if out is not None:
        return torch.mul(y, gain, out=out), rstd
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

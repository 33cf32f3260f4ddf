"""What happens to a fused linear's input before the GEMM: h = prologue(x), recomputed in the backward, never stored.

none:     h = x * l                       rms_norm: h = gain * x * rstd * l
swiglu:   h = silu(gate) * up * l         l: optional input scale (IA3)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.norms import rms_norm_backward, rms_norm_forward, rms_norm_ref

PROLOGUES = ("none", "rms_norm", "swiglu")


class PrologueGrads(NamedTuple):
    dx: tuple[Tensor | None, ...]  # one for each input tensor
    dgain: Tensor | None
    din_scale: Tensor | None


def prologue_ref(name: str, x: tuple[Tensor, ...], gain: Tensor | None, eps: float, in_scale: Tensor | None) -> Tensor:
    """The definition in plain differentiable torch. x: one [..., K] tensor, two (gate, up) for swiglu."""
    if name == "rms_norm":
        h = rms_norm_ref(x[0], gain, eps)
    elif name == "swiglu":
        h = torch.nn.functional.silu(x[0]) * x[1]
    else:
        h = x[0]
    return h if in_scale is None else (h * in_scale).to(h.dtype)


def prologue_forward(
    name: str,
    x: tuple[Tensor, ...],
    gain: Tensor | None,
    eps: float,
    in_scale: Tensor | None,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h [M, K] and, for rms_norm, rstd [M, 1] (used instead of computed where given)."""
    if name == "rms_norm":
        h, rstd = rms_norm_forward(x[0], gain, eps, rstd)
    elif name == "swiglu":
        h = torch.nn.functional.silu(x[0]).mul_(x[1])
    else:
        h = x[0]
    return (h if in_scale is None else (h * in_scale).to(h.dtype)), rstd


def prologue_recompute(
    name: str, x: tuple[Tensor, ...], gain: Tensor | None, eps: float, in_scale: Tensor | None, rstd: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """h again in the backward, and swiglu's silu(gate), which `prologue_backward` needs too."""
    if name != "swiglu":
        return prologue_forward(name, x, gain, eps, in_scale, rstd)[0], None
    activated = torch.nn.functional.silu(x[0])
    h = activated * x[1]
    return (h if in_scale is None else (h * in_scale).to(h.dtype)), activated


def prologue_backward(
    name: str,
    dh: Tensor,
    x: tuple[Tensor, ...],
    gain: Tensor | None,
    eps: float,
    in_scale: Tensor | None,
    rstd: Tensor | None,
    activated: Tensor | None = None,
    *,
    need_dx: tuple[bool, ...],
    need_dgain: bool,
    need_din_scale: bool,
) -> PrologueGrads:
    """Gradients of the prologue's inputs from dh [M, K], each only where asked. dh may be overwritten; `activated` is
    swiglu's silu(gate) where it is known already."""
    if name == "swiglu" and activated is None and (need_dx[1] or need_din_scale):
        activated = torch.nn.functional.silu(x[0])
    din_scale = None
    if in_scale is not None:
        if need_din_scale:
            unscaled = activated * x[1] if name == "swiglu" else prologue_forward(name, x, gain, eps, None, rstd)[0]
            din_scale = (dh * unscaled).sum(0, dtype=accumulate_dtype(dh.dtype)).to(in_scale.dtype)
        dh = (dh * in_scale).to(dh.dtype)
    if name == "rms_norm":
        dx, dgain = rms_norm_backward(dh, x[0], gain, rstd, need_dx=need_dx[0], need_dgain=need_dgain)
        return PrologueGrads((dx,), dgain, din_scale)
    if name == "swiglu":
        dup = dh * activated if need_dx[1] else None
        dgate = torch.ops.aten.silu_backward(dh.mul_(x[1]), x[0]) if need_dx[0] else None
        return PrologueGrads((dgate, dup), None, din_scale)
    return PrologueGrads((dh if need_dx[0] else None,), None, din_scale)

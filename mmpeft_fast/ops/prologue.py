"""What happens to a fused linear's input before the GEMM: h = prologue(x), recomputed in the backward, never stored.

none:     h = x * l                       rms_norm: h = gain * x * rstd * l
swiglu:   h = silu(gate) * up * l         l: optional input scale (IA3)
"""

import torch
from torch import Tensor

from mmpeft_fast.ops.norms import rms_norm_ref

PROLOGUES = ("none", "rms_norm", "swiglu")


def prologue_ref(name: str, x: tuple[Tensor, ...], gain: Tensor | None, eps: float, in_scale: Tensor | None) -> Tensor:
    """The definition in plain differentiable torch. x: one [..., K] tensor, two (gate, up) for swiglu."""
    if name == "rms_norm":
        h = rms_norm_ref(x[0], gain, eps)
    elif name == "swiglu":
        h = torch.nn.functional.silu(x[0]) * x[1]
    else:
        h = x[0]
    return h if in_scale is None else (h * in_scale).to(h.dtype)

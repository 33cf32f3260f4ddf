"""RMSNorm as an op: its gain is differentiated only when it requires grad, and the normalised input is never stored."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops.kernel_set import PrologueSpec
from mmpeft_fast.ops.providers import kernel_set


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.kernels, ctx.eps = kernel_set("rms_norm", x), eps
        y, rstd, _ = ctx.kernels.prologue(PrologueSpec("rms_norm", gain, eps, None), (x,), None)
        ctx.save_for_backward(x, gain, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, gain, rstd = ctx.saved_tensors
        need_dx, need_dgain = ctx.needs_input_grad[:2]
        grads = ctx.kernels.prologue_backward(
            PrologueSpec("rms_norm", gain, ctx.eps, None), dy.clone(memory_format=torch.contiguous_format), (x,), rstd,
            need_dx=(need_dx,), need_dgain=need_dgain,
        )  # fmt: skip
        return grads.dx[0], grads.dgain, None


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
    y = _RMSNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), gain, eps)
    return y.view(x.shape)

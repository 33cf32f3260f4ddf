"""RMSNorm as an op: its gain is differentiated only when it requires grad, and the normalised input is never stored."""

import itertools
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.autocast import without_autocast
from mmpeft_fast.ops.kernel_set import PrologueSpec
from mmpeft_fast.ops.opaque import opaque, traceable
from mmpeft_fast.ops.providers import forced_provider, kernel_set, kernel_set_of


class _RMSNorm(torch.autograd.Function):
    """runner: `_forward` and `_backward` on the kernels of the moment where it is None."""

    @staticmethod
    def forward(ctx, runner, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        ctx.runner, ctx.eps = runner or _Runner(kernel_set("rms_norm", x)), eps
        y, rstd = ctx.runner.forward(x, gain, eps)
        ctx.save_for_backward(x, gain, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, gain, rstd = ctx.saved_tensors
        dx, dgain = ctx.runner.backward(dy, x, gain, rstd, ctx.eps, *ctx.needs_input_grad[1:3])
        return None, dx, dgain, None


class _Runner(NamedTuple):
    kernels: ModuleType

    def forward(self, x, gain, eps) -> tuple[Tensor, Tensor]:
        y, rstd, _ = self.kernels.prologue(PrologueSpec("rms_norm", gain, eps, None), (x,), None)
        return y, rstd

    def backward(self, dy, x, gain, rstd, eps, need_dx, need_dgain) -> tuple[Tensor | None, Tensor | None]:
        grads = self.kernels.prologue_backward(
            PrologueSpec("rms_norm", gain, eps, None), dy.clone(memory_format=torch.contiguous_format), (x,), rstd,
            need_dx=(need_dx,), need_dgain=need_dgain,
        )  # fmt: skip
        return grads.dx[0], grads.dgain


class _OpaqueRunner(NamedTuple):
    provider: str | None

    def forward(self, x, gain, eps) -> tuple[Tensor, Tensor]:
        y, rstd = torch.ops.mmpeft_fast.rms_norm_forward(self.provider, x, gain, eps)
        return y, rstd

    def backward(self, dy, x, gain, rstd, eps, *need) -> tuple[Tensor | None, Tensor | None]:
        grads = iter(torch.ops.mmpeft_fast.rms_norm_backward(self.provider, dy, x, gain, rstd, eps, *need))
        return tuple(next(grads) if wanted else None for wanted in need)


def _runner_of(provider: str | None, x: Tensor) -> _Runner:
    return _Runner(kernel_set_of(provider, "rms_norm", x))


opaque(
    "rms_norm_forward",
    "(str? provider, Tensor x, Tensor gain, float eps)",
    lambda provider, x, gain, eps: list(_runner_of(provider, x).forward(x, gain, eps)),
    lambda provider, x, gain, eps: [
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], 1, dtype=accumulate_dtype(x.dtype)),
    ],
)
opaque(
    "rms_norm_backward",
    "(str? provider, Tensor dy, Tensor x, Tensor gain, Tensor rstd, float eps, bool need_dx, bool need_dgain)",
    lambda provider, dy, x, *rest: list(itertools.compress(_runner_of(provider, x).backward(dy, x, *rest), rest[-2:])),
    lambda provider, dy, x, gain, rstd, eps, *need: [
        tensor.new_empty(tensor.shape) for tensor in itertools.compress((x, gain), need)
    ],
)
traceable(
    "rms_norm",
    "(str? provider, Tensor x, Tensor gain, float eps) -> Tensor",
    lambda provider, x, gain, eps: _RMSNorm.apply(_OpaqueRunner(provider), x, gain, eps),
)


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
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    with without_autocast(x):
        if torch.compiler.is_compiling():
            return torch.ops.mmpeft_fast.rms_norm(forced_provider(), rows, gain, eps).view(x.shape)
        return _RMSNorm.apply(None, rows, gain, eps).view(x.shape)

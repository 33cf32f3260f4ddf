"""Columns of one matrix as tensors of their own: views forward and, where their gradients lie so, a view backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops import stacking


class _SplitColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parts):
        return x.chunk(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return stacking.columns(grads), None


def split_columns(x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """x [..., N] as `parts` views [..., N / parts]; torch's own split would copy the gradients together. Under
    torch.compile it does: how they will lie is not known there.

    Raises:
        ValueError: N is not a multiple of `parts`.
    """
    if x.shape[-1] % parts:
        raise ValueError(f"split_columns: expected a multiple of {parts} columns, got {list(x.shape)}")
    if torch.compiler.is_compiling():
        return x.chunk(parts, dim=-1)
    return _SplitColumns.apply(x, parts)

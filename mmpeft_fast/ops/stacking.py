"""Tensors that lie next to each other in one buffer, seen as one matrix: found out at the call, never assumed.

q, k and v (gate and up) are one GEMM where their weights are rows of one buffer, and their gradients one operand where
they are columns of one. Whoever moves a tensor elsewhere loses the single launch, nothing else.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _follow(tensors: Sequence[Tensor], step) -> bool:
    first = tensors[0]
    storage, offset = first.untyped_storage()._cdata, first.storage_offset()
    for tensor in tensors:
        if (
            tensor.untyped_storage()._cdata != storage
            or tensor.storage_offset() != offset
            or tensor.stride() != first.stride()
            or tensor.dtype != first.dtype
        ):
            return False
        offset += step(tensor)
    return True


def as_rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """[sum N_i, K] over matrices [N_i, K] (or over vectors) that are successive rows of one buffer, or None."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if any(tensor.shape[1:] != first.shape[1:] for tensor in tensors):
        return None
    if not _follow(tensors, lambda tensor: tensor.shape[0] * tensor.stride(0)):
        return None
    return first.as_strided((sum(tensor.shape[0] for tensor in tensors), *first.shape[1:]), first.stride())


def as_columns(tensors: Sequence[Tensor]) -> Tensor | None:
    """[M, sum N_i] over tensors [M, N_i] that are successive columns of one buffer, or None."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if any(tensor.shape[:-1] != first.shape[:-1] or tensor.stride(-1) != 1 for tensor in tensors):
        return None
    if not _follow(tensors, lambda tensor: tensor.shape[-1]):
        return None
    width = sum(tensor.shape[-1] for tensor in tensors)
    return first.as_strided((*first.shape[:-1], width), first.stride())


def rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [N_i, K] as one [sum N_i, K]: a view where they lie so, a copy elsewhere."""
    stacked = as_rows(tensors)
    return torch.cat(list(tensors)) if stacked is None else stacked


def columns(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors [M, N_i] as one [M, sum N_i]: a view where they lie so, a copy elsewhere."""
    stacked = as_columns(tensors)
    return torch.cat(list(tensors), dim=-1) if stacked is None else stacked


def empty_columns(like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Uninitialised successive columns of one buffer, with the shapes and dtype of `like`."""
    widths = [tensor.shape[-1] for tensor in like]
    return like[0].new_empty(*like[0].shape[:-1], sum(widths)).split(widths, dim=-1)

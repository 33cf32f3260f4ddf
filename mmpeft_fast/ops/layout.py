"""The low-rank GEMM by layout: weights lie in buffers [W | s U], operands in buffers [h | z], and one library GEMM of
depth K + R is the fused op: library speed on every device for R / K more FLOPs.

A weight with spare columns is an ordinary parameter [N, K] whose rows are K + spare apart; `layers.stacked_weights`
makes it so. s U is copied into the spare columns at every call, which is nothing beside the GEMM: who updates U, and
how, need not be known. Segments of a stacked weight have columns of their own, 0 in each other's rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.ops import stacking
from mmpeft_fast.ops.kernel_set import Term

_ATTRIBUTE = "spare_columns"


class Joint(NamedTuple):
    """[W | s U] [N, K + S] and [h | z] [M, K + S]; h: the first K columns of the latter."""

    weight: Tensor
    operand: Tensor
    h: Tensor


def mark(weight: Tensor, spare: int) -> None:
    """Says that the `spare` columns after each of the weight's rows are there for s U."""
    setattr(weight, _ATTRIBUTE, spare)


def is_marked(weight: Tensor) -> bool:
    """Whether `mark` was told about it, with spare columns or without."""
    return hasattr(weight, _ATTRIBUTE)


def unmark(weight: Tensor) -> None:
    delattr(weight, _ATTRIBUTE)


def spare_columns(weight: Tensor) -> int:
    """How many columns are free behind a weight [N, K]; 0 where its memory is not what `mark` was told about."""
    spare = getattr(weight, _ATTRIBUTE, 0)
    return spare if spare and weight.stride() == (weight.shape[1] + spare, 1) else 0


def joint(weight: Tensor, spare: int, num_rows: int) -> Joint:
    """Buffers for a call of `num_rows` rows; weight [N, K] is what all segments' weights make up."""
    num_out, width = weight.shape
    operand = weight.new_empty(num_rows, width + spare)
    wide = weight.as_strided((num_out, width + spare), (width + spare, 1))
    return Joint(wide, operand, operand[:, :width])


def multiply(buffers: Joint, terms: Sequence[Term], *, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """h W^T + the terms + bias + residual [M, N]; h is in its place, z and s U are copied to theirs."""
    weight, operand, h = buffers
    width = h.shape[1]
    if len(terms) > 1:  # in one pass, whatever the terms' rows
        weight[:, width:].zero_()
    column = width
    for term in terms:
        end = column + term.z.shape[1]
        block = weight[:, column:end]
        torch.mul(term.up, term.scaling, out=block[term.start : term.stop])
        if len(terms) == 1 and term.stop - term.start < len(block):
            block[: term.start].zero_()
            block[term.stop :].zero_()
        column = end
    if terms:
        operand[:, width:column].copy_(stacking.columns([term.z for term in terms]))
    if column < operand.shape[1]:
        operand[:, column:].zero_()
    if bias is None and residual is None:
        return operand @ weight.t()
    if bias is None or residual is None:
        return torch.addmm(residual if bias is None else bias, operand, weight.t())
    return torch.addmm(bias, operand, weight.t()).add_(residual)

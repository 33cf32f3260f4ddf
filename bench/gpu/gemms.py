"""Every way to run the low-rank GEMM, on the same operands: bare, composite, layout, triton, gluon.

    fwd: out_i = x W_i^T + s z_i U_i^T for segments i of a stacked weight          dx: out = dy W

`bare` is the library's GEMM of x and W alone, the yardstick: what the frozen model pays.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.ops import kernels_torch
from mmpeft_fast.ops.kernel_set import Term

WAYS = ("composite", "layout", "triton", "gluon")


class Operands(NamedTuple):
    """x [M, K]; weight [N, K] (fwd) or [K, N] (dx); z [M, sum of ranks], up [N, R] stacked; both None without ranks.

    x and weight are columns of `x_wide` [M, K + sum R] and `weight_wide` [N, K + sum R], whose other columns hold z and
    s U, block-diagonal: what the layout way multiplies.
    """

    x: Tensor
    weight: Tensor
    z: Tensor | None
    up: Tensor | None
    num_outs: tuple[int, ...]
    rank: int
    scaling: float
    x_wide: Tensor | None
    weight_wide: Tensor | None


def forward_operands(
    num_rows: int, depth: int, num_outs: tuple[int, ...], rank: int, *, dtype: torch.dtype, device: str
) -> Operands:
    """Random operands of a stacked forward GEMM with one branch of `rank` a segment."""
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    num_out, num_ranks, scaling = sum(num_outs), rank * len(num_outs), 2.0
    x, z = torch.randn(num_rows, depth, **options), torch.randn(num_rows, num_ranks, **options)
    weight = torch.randn(num_out, depth, **options) * depth**-0.5
    up = torch.randn(num_out, rank, **options) * rank**-0.5
    blocks = torch.block_diag(*(scaling * part for part in up.split(list(num_outs)))).to(dtype)
    wide = torch.cat((x, z), dim=1), torch.cat((weight, blocks), dim=1)
    return Operands(x, weight, z, up, num_outs, rank, scaling, *wide)


def dx_operands(num_rows: int, depth: int, num_out: int, *, dtype: torch.dtype, device: str) -> Operands:
    """Random operands of dy W; the low-rank part of dh is the prologue's backward's."""
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    x = torch.randn(num_rows, depth, **options)
    weight = torch.randn(depth, num_out, **options) * depth**-0.5
    return Operands(x, weight, None, None, (num_out,), 0, 1.0, None, None)


def terms(operands: Operands) -> list[Term]:
    start, found = 0, []
    for i, num_out in enumerate(operands.num_outs):
        z = operands.z[:, i * operands.rank : (i + 1) * operands.rank]
        found.append(Term(z, operands.up[start : start + num_out], operands.scaling, start, start + num_out))
        start += num_out
    return found


def bare(operands: Operands) -> Tensor:
    return operands.x @ (operands.weight.t() if operands.z is not None else operands.weight)


def composite(operands: Operands) -> Tensor:
    if operands.z is None:
        return kernels_torch.lowrank_gemm_dx(operands.x, operands.weight)
    return kernels_torch.lowrank_gemm(operands.x, operands.weight, terms(operands))


def layout(operands: Operands) -> Tensor:
    return operands.x_wide @ operands.weight_wide.t()


def launched(way: str, operands: Operands, tile) -> Callable[[], Tensor]:
    """A launch of the `triton` or `gluon` kernel with a tile; None stands for the kernel's default tile."""
    from mmpeft_kernels import lowrank_gemm as plain
    from mmpeft_kernels.segments import SegmentShape
    from mmpeft_kernels.tile import architecture

    if way == "gluon":
        from mmpeft_kernels import lowrank_gemm_gluon

        launch, default = lowrank_gemm_gluon.lowrank_gemm, lowrank_gemm_gluon.DEFAULT_TILE
    else:
        launch = plain.lowrank_gemm
        default = plain.default_tile(architecture(operands.x.device), operands.x.element_size())
    low_rank = {"transposed": False}
    if operands.z is not None:
        segments = [SegmentShape(num_out, operands.rank) for num_out in operands.num_outs]
        low_rank = {"z": operands.z, "u": operands.up, "scaling": operands.scaling, "segments": segments}
    return lambda: launch(operands.x, operands.weight, tile=tile or default, **low_rank)


def runs_on_cuda(operands: Operands) -> bool:
    """Whether the extension's CUDA kernel is there and takes these operands."""
    from mmpeft_fast.ops.providers import why_not_installed

    if operands.x.device.type != "cuda" or why_not_installed("cuda") is not None:
        return False
    from mmpeft_kernels.segments import SegmentShape

    from mmpeft_fast.ops.kernels_cuda import gemm_obstacle

    segments = [SegmentShape(num_out, operands.rank) for num_out in operands.num_outs]
    out = operands.x.new_empty(operands.x.shape[0], sum(operands.num_outs))
    return gemm_obstacle(operands.x, operands.weight, out, z=operands.z, u=operands.up, segments=segments) is None


def on_cuda(operands: Operands) -> Tensor:
    from mmpeft_fast.ops import kernels_cuda

    if operands.z is None:
        return kernels_cuda.lowrank_gemm_dx(operands.x, operands.weight)
    return kernels_cuda.lowrank_gemm(operands.x, operands.weight, terms(operands))


def num_flops(operands: Operands) -> int:
    """Of the GEMM alone, without its low-rank part."""
    num_out = sum(operands.num_outs)
    return 2 * operands.x.shape[0] * operands.x.shape[1] * num_out

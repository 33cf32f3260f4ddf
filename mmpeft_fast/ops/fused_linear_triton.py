"""The Triton provider of the fused linear: five kinds of launch for a forward and backward of any number of segments.

Runs what LoRA, IA3's input scale, norm tuning and frozen layers need: parallel branches that agree in scaling,
activation and mask, at most one a segment. Everything else stays with the torch provider.
"""

from collections.abc import Sequence

import torch
from mmpeft_kernels import lowrank_gemm as gemm
from mmpeft_kernels.ddown import ddown
from mmpeft_kernels.dy_pass import dy_pass
from mmpeft_kernels.prologue import prologue
from mmpeft_kernels.prologue_backward import prologue_backward
from mmpeft_kernels.segments import SegmentShape
from torch import Tensor

from mmpeft_fast.ops.fused_call import BranchSpec, Call, Grads, Kept, Needs, SegmentGrads


def unsupported(call: Call, need: Needs) -> str | None:
    """Why this call is not for this provider, or None."""
    branches = [branch.spec for seg in call.segments for branch in seg.branches]
    if any(branch.position != "parallel" for branch in branches):
        return "pre and post branches"
    if len(set(branches)) > 1:
        return "branches that differ in scaling, activation or mask"
    if any(len(seg.branches) > 1 for seg in call.segments):
        return "several branches on one segment"
    if any(seg.out_scale is not None for seg in call.segments):
        return "output scales"
    if any(wanted.weight or wanted.bias for wanted in need.segments):
        return "trained base weights and biases"
    if call.x[0].dtype == torch.float64:
        return "float64"
    return None


def _branch_spec(call: Call) -> BranchSpec:
    specs = [branch.spec for seg in call.segments for branch in seg.branches]
    return specs[0] if specs else BranchSpec(1.0, "identity", "parallel", None)


def _mask_options(call: Call) -> dict:
    mask = _branch_spec(call).mask
    return {} if mask is None else {"p": mask[0], "stream": mask[1], "seed": call.seed}


def _prologue_options(call: Call) -> dict:
    return {"name": call.spec.prologue, "gain": call.gain, "in_scale": call.in_scale}


def _stacked_downs(call: Call) -> Tensor | None:
    downs = [branch.down for seg in call.segments for branch in seg.branches]
    return None if not downs else (downs[0] if len(downs) == 1 else torch.cat(downs))


def _ranks(call: Call) -> list[int]:
    return [sum(branch.down.shape[0] for branch in seg.branches) for seg in call.segments]


def _architecture(x: Tensor) -> int:
    return torch.cuda.get_device_capability(x.device)[0] * 10 if x.is_cuda else 80


def _gemm(x: Tensor, weight: Tensor, *, transposed: bool, residual: Tensor | None = None, **options) -> Tensor:
    num_out = weight.shape[0] if transposed else weight.shape[1]
    out = x.new_empty(x.shape[0], num_out)
    operands = [x, weight, out] + ([] if residual is None else [residual])
    use_tma = _architecture(x) >= 90 and all(gemm.can_use_tma(operand) for operand in operands)
    tile = gemm.default_tile(_architecture(x), x.element_size(), use_tma=use_tma)
    return gemm.lowrank_gemm(x, weight, tile=tile, transposed=transposed, residual=residual, out=out, **options)


def forward(call: Call, need: Needs) -> tuple[list[Tensor], Kept]:
    """As the torch provider's; rstd is [M]."""
    spec = _branch_spec(call)
    h, rstd, a, z = prologue(
        *call.x, **_prologue_options(call), **_mask_options(call), eps=call.spec.eps, down=_stacked_downs(call),
        activation=spec.activation,
    )  # fmt: skip
    ranks = _ranks(call)
    a_parts = [None] * len(ranks) if a is None else a.split(ranks, dim=1)
    z_parts = [None] * len(ranks) if z is None else z.split(ranks, dim=1)
    outputs = []
    for seg, z_part in zip(call.segments, z_parts, strict=True):
        low_rank = {"z": z_part, "u": seg.branches[0].up, "scaling": spec.scaling} if seg.branches else {}
        outputs.append(_gemm(h, seg.weight, transposed=True, bias=seg.bias, residual=call.residual, **low_rank))
    a_inner = [part for part, rank in zip(a_parts, ranks, strict=True) if rank]
    return outputs, Kept(rstd if need.kept_x else None, a_inner, [], [], [])


def backward(call: Call, need: Needs, kept: Kept, dys: Sequence[Tensor]) -> Grads:
    """As the torch provider's."""
    spec, ranks = _branch_spec(call), _ranks(call)
    trains_down = any(want.down for wanted in need.segments for want in wanted.branches)
    a_parts = iter(kept.a_inner)
    dh, da_parts, dups = None, [], []
    for seg, wanted, dy, rank in zip(call.segments, need.segments, dys, ranks, strict=True):
        dy = dy.contiguous()
        if seg.branches:
            da, dup = dy_pass(
                dy, next(a_parts), seg.branches[0].up, segments=(SegmentShape(dy.shape[1], rank),),
                scaling=spec.scaling, activation=spec.activation,
                need_da=need.dh or trains_down, need_du=wanted.branches[0].up,
            )  # fmt: skip
            da_parts.append(da)
            dups.append(dup)
        if need.dh:
            dh = _gemm(dy, seg.weight, transposed=False, residual=dh)
    da = torch.cat(da_parts, dim=1) if da_parts and da_parts[0] is not None else None
    down, mask, options = _stacked_downs(call), _mask_options(call), _prologue_options(call)
    ddown_parts = [None] * len(dups)
    if trains_down:
        ddown_parts = ddown(da, *call.x, out_dtype=down.dtype, rstd=kept.rstd, **options, **mask).split(
            [rank for rank in ranks if rank]
        )
    dx, dgain, din_scale = (None,) * len(call.x), None, None
    if need.dh:
        grads = prologue_backward(
            dh, *call.x, **options, **(mask if da is not None else {}), rstd=kept.rstd, da=da,
            down=down if da is not None else None, need_dx=need.x[0], need_dup=need.x[-1], need_dgain=need.gain,
            need_din_scale=need.in_scale,
        )  # fmt: skip
        dx = (grads.dx, grads.dup)[: len(call.x)]
        dgain, din_scale = grads.dgain, grads.din_scale
    pairs = iter(zip(ddown_parts, dups, strict=True))
    segments = []
    for seg, wanted in zip(call.segments, need.segments, strict=True):
        branches = []
        for _, want in zip(seg.branches, wanted.branches, strict=True):
            part, dup = next(pairs)
            branches.append((part if want.down else None, dup))
        segments.append(SegmentGrads(None, None, None, branches))
    return Grads(dys[0] if need.residual else None, dgain, din_scale, dx, segments)

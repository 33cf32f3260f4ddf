"""The kernel set with the extension's CUDA kernels (csrc/cuda) for GEMM and dy pass; the rest is Triton's.

Every function hands the Triton provider's function a launcher of the same signature. What a CUDA kernel cannot take
goes to the Triton kernel, with one log line a reason.
"""

from collections.abc import Sequence

import torch
from mmpeft_kernels.segments import SegmentShape
from torch import Tensor

from mmpeft_fast.ops import csrc, kernels_triton
from mmpeft_fast.ops.kernels_torch import adds_in_dx
from mmpeft_fast.ops.kernels_triton import (
    cross_entropy_,
    heads,
    heads_backward,
    keep_bits,
    merge_prefix,
    post_branch,
    prefix_backward,
    prologue,
    prologue_backward,
)
from mmpeft_fast.ops.providers import log_fallback

__all__ = [
    "adds_in_dx", "cross_entropy_", "dy_pass", "heads", "heads_backward", "keep_bits", "lowrank_gemm",
    "lowrank_gemm_dx", "merge_prefix", "post_branch", "prefix_backward", "prologue", "prologue_backward",
    "unsupported",
]  # fmt: skip

_DTYPES = (torch.bfloat16, torch.float16)
# What the GEMM asks of its operands: TMA's alignment, whole instruction tiles of inner segments and ranks.
_TMA_BYTES, _SEGMENT_COLUMNS, _RANK_MULTIPLE, _MAX_SEGMENTS = 16, 64, 8, 4

# What a call does is recorded and done again from the record (`ops.tape`).
IS_TAPED = True


def unsupported(x: Tensor) -> str | None:
    """Why this provider cannot run calls on tensors like x, or None."""
    if csrc.why_no_cuda() is not None:
        return f"anything: {csrc.why_no_cuda()}"
    if x.dtype not in _DTYPES:
        return str(x.dtype).removeprefix("torch.")
    return None if x.is_cuda else f"tensors on {x.device.type}"


def _unaligned(**matrices: Tensor | None) -> str | None:
    for name, matrix in matrices.items():
        if matrix is None:
            continue
        stride_bytes = matrix.stride(0) * matrix.element_size()
        if matrix.data_ptr() % _TMA_BYTES or stride_bytes % _TMA_BYTES or matrix.stride(1) != 1:
            return f"{name} with rows of {stride_bytes} bytes (needs whole {_TMA_BYTES})"
    return None


def gemm_obstacle(x, weight, out, *, residual=None, z=None, u=None, segments=()) -> str | None:
    """Why the Hopper GEMM cannot take these operands, or None."""
    capability = torch.cuda.get_device_capability(x.device)
    if capability != (9, 0):
        return f"compute capability {capability} (needs 9.0)"
    if len(segments) > _MAX_SEGMENTS:
        return f"{len(segments)} segments (at most {_MAX_SEGMENTS})"
    inner = segments[:-1]
    if any(segment.num_out % _SEGMENT_COLUMNS or segment.rank % _RANK_MULTIPLE for segment in inner):
        return f"inner segments of {[tuple(segment) for segment in inner]}"
    return _unaligned(x=x, weight=weight, out=out, residual=residual, z=z, u=u)


def _launch_gemm(direction, x, weight, out, *, bias=None, residual=None, z=None, u=None, scaling=1.0, segments=None):
    u = None if u is None else u.to(x.dtype)
    shapes = segments or [SegmentShape(out.shape[1], 0 if z is None else z.shape[1])]
    obstacle = gemm_obstacle(x, weight, out, residual=residual, z=z, u=u, segments=shapes)
    if obstacle is not None:
        log_fallback("lowrank_gemm", "cuda", obstacle, "triton")
        low_rank = {} if z is None else {"z": z, "u": u, "scaling": scaling, "segments": segments}
        return kernels_triton._launch_gemm(direction, x, weight, out, bias=bias, residual=residual, **low_rank)
    csrc.cuda_op(
        "lowrank_gemm_out", x, weight, z, u, scaling, [shape.num_out for shape in shapes],
        [shape.rank for shape in shapes], direction == "fwd", bias, None, residual, out,
    )  # fmt: skip
    return out


def _launch_dy_pass(dy, a, u, *, segments, scaling, activation, need_da, need_du, tile=None):
    num_outs, ranks = ([getattr(segment, field) for segment in segments] for field in ("num_out", "rank"))
    return csrc.cuda_op("dy_pass", dy, a, u, num_outs, ranks, scaling, activation, need_da, need_du)


def lowrank_gemm(*arguments, **options) -> Tensor:
    """As `kernels_torch.lowrank_gemm`, by csrc/cuda/lowrank_gemm_sm90.cu."""
    return kernels_triton.lowrank_gemm(*arguments, launch=_launch_gemm, **options)


def lowrank_gemm_dx(*arguments, **options) -> Tensor:
    """As `kernels_torch.lowrank_gemm_dx`, by csrc/cuda/lowrank_gemm_sm90.cu."""
    return kernels_triton.lowrank_gemm_dx(*arguments, launch=_launch_gemm, **options)


def dy_pass(dys: Sequence[Tensor], *arguments, **options):
    """As `kernels_torch.dy_pass`, by csrc/cuda/dy_pass.cu."""
    return kernels_triton.dy_pass(dys, *arguments, launch=_launch_dy_pass, **options)

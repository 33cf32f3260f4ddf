"""A bottleneck branch on the output of a linear layer, in one kernel: out = y + s U f(D drop(y)) (+ residual).

The study's Adapter on the down projection (arXiv 2406.05130). Two passes over a block of rows, the second from cache.
Backward: da = s (dout U) f'(a), dU = s dout^T f(a), dD = da^T drop(y), dy = dout + mask * (da D) / keep.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from mmpeft_kernels.activations import activate
from mmpeft_kernels.ddown import ddown
from mmpeft_kernels.dropout import dropped_tile, inverse_keep_of, threshold_of
from mmpeft_kernels.dy_pass import dy_pass
from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.prologue_backward import prologue_backward
from mmpeft_kernels.segments import SegmentShape
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import Tile, architecture, cdiv, padded_rank

# The accumulator of a and the operand z of one block of rows stay in registers.
MAX_RANK = 256


def default_tile(rank: int, itemsize: int, arch: int | str) -> Tile:
    """Blocks for a bottleneck of `rank`."""
    if itemsize > 2:
        return Tile(block_m=16, block_n=16, num_warps=8)
    num_warps = 4 if padded_rank(rank) <= 128 else 8
    if isinstance(arch, str):  # AMD: 64 threads a warp, and wide blocks spill
        return Tile(block_m=32, block_n=32, num_warps=num_warps // 2, num_stages=2)
    return Tile(block_m=32, block_n=64, num_warps=num_warps, num_stages=2)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _post_adapter_kernel(
    y_ptr, down_ptr, up_ptr, residual_ptr, seed_ptr, out_ptr, a_ptr,
    M, N, R, stride_ym, stride_dr, stride_un, stride_residualm, scaling, inverse_keep, stream, threshold,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m, mask_r = offs_m < M, offs_r < R
    dtype = y_ptr.dtype.element_ty
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # Phase 1: the bottleneck.
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_m[:, None] & mask_n[None, :]
        y = tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], mask=mask, other=0.0)
        if seed_ptr is not None:
            y = tl.where(dropped_tile(seed, stream, threshold, offs_m, n, BLOCK_N), 0.0, y)
        down_mask = mask_r[:, None] & mask_n[None, :]
        down = tl.load(down_ptr + offs_r[:, None] * stride_dr + offs_n[None, :], mask=down_mask, other=0.0)
        acc = tl.dot(y, down.to(dtype).T, acc, input_precision="ieee")
    a = (acc * inverse_keep).to(dtype)
    tl.store(a_ptr + offs_m[:, None] * R + offs_r[None, :], a, mask=mask_m[:, None] & mask_r[None, :])
    z = activate(a.to(tl.float32), ACTIVATION).to(dtype)

    # Phase 2: its contribution, added in float32.
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_m[:, None] & mask_n[None, :]
        up_mask = mask_n[:, None] & mask_r[None, :]
        up = tl.load(up_ptr + offs_n[:, None] * stride_un + offs_r[None, :], mask=up_mask, other=0.0)
        out = tl.dot(z, up.to(dtype).T, input_precision="ieee") * scaling
        out += tl.load(y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            residual = residual_ptr + offs_m[:, None] * stride_residualm + offs_n[None, :]
            out += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], out.to(dtype), mask=mask)


def post_adapter(
    y, down, up, *, scaling=1.0, activation="identity", p=0.0, seed=None, stream=0, residual=None,
    tile: Tile | None = None,
):  # fmt: skip
    """(out [M, N], a [M, R]) in y's dtype; a is what the backward needs.

    y [M, N]; down [R, N], up [N, R], any float dtype; residual [M, N] in y's dtype; unit column strides.
    p, seed, stream: dropout of the branch's input.

    Raises:
        ValueError: R above MAX_RANK.
    """
    (num_rows, num_out), rank = y.shape, down.shape[0]
    if rank > MAX_RANK:
        raise ValueError(f"post_adapter: expected a rank of at most {MAX_RANK}, got {rank}")
    out, a = y.new_empty(num_rows, num_out), y.new_empty(num_rows, rank)
    block_r = padded_rank(rank)

    def attempt(tile: Tile) -> None:
        launch(
            _post_adapter_kernel, (cdiv(num_rows, tile.block_m),), y.device,
            y, down, up, residual, seed if p > 0.0 else None, out, a,
            num_rows, num_out, rank, y.stride(0), down.stride(0), up.stride(0),
            0 if residual is None else residual.stride(0), scaling, inverse_keep_of(p), stream, threshold_of(p),
            ACTIVATION=activation, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=block_r, **tile.options,
        )  # fmt: skip

    if num_rows:
        arch, itemsize = architecture(y.device), y.element_size()
        tile = tile or default_tile(rank, itemsize, arch)
        wide = max(down.element_size(), up.element_size()) > itemsize
        fitted(Footprint("post_adapter", arch, itemsize, block_r, wide=wide), tile, y.device, attempt)
    return out, a


class PostAdapterGrads(NamedTuple):
    dy: object | None  # [M, N]
    ddown: object | None  # [R, N] in down's dtype
    dup: object | None  # [N, R] in up's dtype


def post_adapter_backward(
    dout, y, a, down, up, *, scaling=1.0, activation="identity", p=0.0, seed=None, stream=0,
    need_dy=True, need_ddown=True, need_dup=True, dy_out=None,
) -> PostAdapterGrads:  # fmt: skip
    """Each gradient only where asked; the residual's is dout itself.

    dout [M, N], y and a of the forward, down, up and the dropout as in `post_adapter`; dy goes to `dy_out` [M, N] where
    given, which may not overlap an input.
    """
    segments = (SegmentShape(dout.shape[1], a.shape[1]),)
    da, dup = dy_pass(
        dout, a, up, segments=segments, scaling=scaling, activation=activation,
        need_da=need_dy or need_ddown, need_du=need_dup,
    )  # fmt: skip
    mask = {"p": p, "seed": seed, "stream": stream}
    return PostAdapterGrads(
        prologue_backward(dout, da=da, down=down, dx_out=dy_out, **mask).dx if need_dy else None,
        ddown(da, y, out_dtype=down.dtype, **mask) if need_ddown else None,
        dup,
    )

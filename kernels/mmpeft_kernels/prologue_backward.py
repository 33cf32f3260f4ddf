"""Gradients of a prologue's inputs from dh, with the low-rank part of dh and the residual's gradient added on the way.

    dh += mask * (da D) / keep                              where the GEMM that made dh has not added it
    none:     dx = dh l          swiglu: dgate = dh l up silu'(gate), dup = dh l silu(gate)
    rms_norm: n = x rstd, dn = dh l gain, dx = (dn - n mean(dn n)) rstd, dgain = sum_m dh l n
    dl = sum_m dh h0, h0 the prologue's result before its input scale l

`dgain` and `dl` are split over blocks of rows and reduced in a fixed order; neither is computed unless asked for.
Every element is read and written once: rms_norm keeps whole rows in registers, the others need no row at all. Only
rms_norm with a low-rank part, or of rows too wide, goes over its rows twice.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from mmpeft_kernels.dropout import dropped_tile, inverse_keep_of, threshold_of
from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.prologue import MAX_WHOLE_ROW, scaled_by, scaled_row, unscaled_h_tile, warps_of_row
from mmpeft_kernels.reduction import sum_partials
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import Tile, architecture, cdiv, padded_rank

# Ranks of one step of da D.
MAX_BLOCK_R = 64
# Rows of a program that sums over rows.
_ROWS = 16


def default_tile(rank: int, itemsize: int, arch: int | str, *, wide: bool = False) -> Tile:
    """Blocks for `rank` columns of da (0 for none): few rows, wider where D is read again for more ranks. Fastest on an
    H200 over the calls of a layer, at ranks 16 and 128; AMD's is unmeasured. wide: D is float32 under narrower
    operands, whose cast takes registers: more threads hold a tile, so that nothing spills."""
    if rank == 0:
        return Tile(block_m=16, block_n=128, num_warps=8)
    if itemsize > 2:
        return Tile(block_m=16, block_n=32, num_warps=8, num_stages=2)
    if isinstance(arch, str):
        return Tile(block_m=32, block_n=64, num_warps=4)
    if padded_rank(rank) > 64:
        return Tile(block_m=16, block_n=256, num_warps=4)
    return Tile(block_m=32, block_n=128, num_warps=8 if wide else 4)


@triton.jit(do_not_specialize=["stream", "threshold"])
def _prologue_backward_kernel(
    dh_ptr, da_ptr, down_ptr, seed_ptr, x_ptr, up_ptr, gain_ptr, rstd_ptr, in_scale_ptr, dresidual_ptr,
    dx_ptr, dup_ptr, dgain_ptr, din_scale_ptr,
    M, K, R, span, stride_dhm, stride_dam, stride_dr, stride_xm, stride_upm, stride_dresidualm, stride_dxm, stride_dupm,
    inverse_keep, stream, threshold,
    PROLOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m = tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    dtype = dh_ptr.dtype.element_ty
    rstd = tl.zeros([BLOCK_M], tl.float32)
    if PROLOGUE == "rms_norm":
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    # Phase 1: the whole dh, its reductions over rows, and all of dx that needs no statistic of the row. `span` columns
    # are this program's: all of them where such a statistic follows.
    projection = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    first_k = tl.program_id(1) * span
    for k in range(first_k, min(K, first_k + span), BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = mask_m[:, None] & mask_k[None, :]
        dh = tl.load(dh_ptr + offs_m[:, None] * stride_dhm + offs_k[None, :], mask=mask, other=0.0)
        if da_ptr is not None:
            product = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
            for r in range(0, R, BLOCK_R):
                offs_r = r + tl.arange(0, BLOCK_R)
                mask_r = offs_r < R
                da = tl.load(
                    da_ptr + offs_m[:, None] * stride_dam + offs_r[None, :],
                    mask=mask_m[:, None] & mask_r[None, :],
                    other=0.0,
                )
                down = tl.load(
                    down_ptr + offs_r[:, None] * stride_dr + offs_k[None, :],
                    mask=mask_r[:, None] & mask_k[None, :],
                    other=0.0,
                )
                product = tl.dot(da, down.to(dtype), product, input_precision="ieee")
            if seed_ptr is not None:
                dropped = dropped_tile(seed, stream, threshold, offs_m, k, BLOCK_K)
                product = tl.where(dropped, 0.0, product * inverse_keep)
            dh = (dh.to(tl.float32) + product).to(dtype)
        if din_scale_ptr is not None:
            h0 = unscaled_h_tile(x_ptr, up_ptr, gain_ptr, rstd, offs_m, offs_k, M, K, stride_xm, stride_upm, PROLOGUE)
            din_scale = tl.sum(dh.to(tl.float32) * h0.to(tl.float32), axis=0)
            tl.store(din_scale_ptr + pid_m * K + offs_k, din_scale, mask=mask_k)
        dh = scaled_by(dh, in_scale_ptr, offs_k, K)
        wide = dh.to(tl.float32)
        if PROLOGUE == "rms_norm":
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
            normalised = x.to(tl.float32) * rstd[:, None]
            if dgain_ptr is not None:
                tl.store(dgain_ptr + pid_m * K + offs_k, tl.sum(wide * normalised, axis=0), mask=mask_k)
            if dx_ptr is not None:
                gain = tl.load(gain_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
                projection += wide * gain[None, :] * normalised
                tl.store(dh_ptr + offs_m[:, None] * stride_dhm + offs_k[None, :], dh, mask=mask)
        else:
            dx = wide
            if PROLOGUE == "swiglu":
                gate = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
                gate = gate.to(tl.float32)
                sigmoid = tl.sigmoid(gate)
                if dup_ptr is not None:
                    dup = (wide * (gate * sigmoid).to(dtype).to(tl.float32)).to(dtype)
                    tl.store(dup_ptr + offs_m[:, None] * stride_dupm + offs_k[None, :], dup, mask=mask)
                up = tl.load(up_ptr + offs_m[:, None] * stride_upm + offs_k[None, :], mask=mask, other=0.0)
                dx = (wide * up.to(tl.float32)).to(dtype).to(tl.float32) * sigmoid * (1 + gate * (1 - sigmoid))
            if dx_ptr is not None:
                if dresidual_ptr is not None:
                    dresidual = tl.load(
                        dresidual_ptr + offs_m[:, None] * stride_dresidualm + offs_k[None, :], mask=mask, other=0.0
                    )
                    dx += dresidual.to(tl.float32)
                tl.store(dx_ptr + offs_m[:, None] * stride_dxm + offs_k[None, :], dx.to(dtype), mask=mask)

    # Phase 2: what phase 1 left in dh, minus its projection on the normalised row.
    if PROLOGUE == "rms_norm" and dx_ptr is not None:
        mean = tl.sum(projection, axis=1) / K
        # Other threads of this program may have written the elements that this one reads back.
        tl.debug_barrier()
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < K
            mask = mask_m[:, None] & mask_k[None, :]
            dh = tl.load(dh_ptr + offs_m[:, None] * stride_dhm + offs_k[None, :], mask=mask, other=0.0)
            x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :], mask=mask, other=0.0)
            gain = tl.load(gain_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
            normalised = x.to(tl.float32) * rstd[:, None]
            dx = (dh.to(tl.float32) * gain[None, :] - normalised * mean[:, None]) * rstd[:, None]
            if dresidual_ptr is not None:
                dresidual = tl.load(
                    dresidual_ptr + offs_m[:, None] * stride_dresidualm + offs_k[None, :], mask=mask, other=0.0
                )
                dx += dresidual.to(tl.float32)
            tl.store(dx_ptr + offs_m[:, None] * stride_dxm + offs_k[None, :], dx.to(dtype), mask=mask)


@triton.jit
def _prologue_backward_rows_kernel(
    dh_ptr, x_ptr, gain_ptr, rstd_ptr, in_scale_ptr, dresidual_ptr, dx_ptr, dgain_ptr, din_scale_ptr,
    M, K, stride_dhm, stride_xm, stride_dresidualm, stride_dxm,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """rms_norm without a low-rank part: ROWS rows of K columns, one after another, each held in registers."""
    pid = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    dtype = dh_ptr.dtype.element_ty
    gain = tl.load(gain_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    dgain = tl.zeros([BLOCK_K], tl.float32)
    din_scale = tl.zeros([BLOCK_K], tl.float32)
    for i in range(ROWS):
        row = pid * ROWS + i
        mask = mask_k & (row < M)
        dh = tl.load(dh_ptr + row * stride_dhm + offs_k, mask=mask, other=0.0)
        x = tl.load(x_ptr + row * stride_xm + offs_k, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
        normalised = x * rstd
        if din_scale_ptr is not None:
            h0 = (normalised.to(dtype).to(tl.float32) * gain).to(dtype)
            din_scale += dh.to(tl.float32) * h0.to(tl.float32)
        wide = scaled_row(dh, in_scale_ptr, offs_k, K).to(tl.float32)
        if dgain_ptr is not None:
            dgain += wide * normalised
        if dx_ptr is not None:
            dn = wide * gain
            mean = tl.sum(dn * normalised, axis=0) / K
            dx = (dn - normalised * mean) * rstd
            if dresidual_ptr is not None:
                dx += tl.load(dresidual_ptr + row * stride_dresidualm + offs_k, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * stride_dxm + offs_k, dx.to(dtype), mask=mask)
    if dgain_ptr is not None:
        tl.store(dgain_ptr + pid * K + offs_k, dgain, mask=mask_k)
    if din_scale_ptr is not None:
        tl.store(din_scale_ptr + pid * K + offs_k, din_scale, mask=mask_k)


class PrologueGrads(NamedTuple):
    dx: object | None  # [M, K]; dgate for swiglu
    dup: object | None  # [M, K], swiglu only
    dgain: object | None  # [K] in gain's dtype
    din_scale: object | None  # [K] in in_scale's dtype


def prologue_backward(
    dh, x=None, up=None, *, name="none", gain=None, rstd=None, in_scale=None, da=None, down=None, p=0.0, seed=None,
    stream=0, dresidual=None, need_dx=True, need_dup=True, need_dgain=False, need_din_scale=False, dx_out=None,
    dup_out=None, tile: Tile | None = None,
):  # fmt: skip
    """Each gradient only where asked; dx may be dropped too, where a gain is trained under frozen layers.

    dh [M, K], overwritten by rms_norm; x, up, gain, in_scale as in `prologue`, rstd [M] from it (x may be None where
    nothing needs it); da [M, R] in dh's dtype with down [R, K] for the low-rank part, and its dropout p, seed, stream;
    dresidual [M, K], added to dx. Matrices have unit column strides and any row strides. Gradients are in the dtypes of
    what they belong to; dx and dup go to dx_out and dup_out [M, K] where given (columns of one buffer, say), neither of
    which may overlap an input.
    """
    import torch

    num_rows, width = dh.shape
    rank = 0 if da is None else da.shape[1]
    need_dgain = need_dgain and name == "rms_norm"
    need_din_scale = need_din_scale and in_scale is not None
    need_dup = need_dup and name == "swiglu"
    dx = (dh.new_empty(num_rows, width) if dx_out is None else dx_out) if need_dx else None
    dup = (dh.new_empty(num_rows, width) if dup_out is None else dup_out) if need_dup else None
    block_r = padded_rank(rank, MAX_BLOCK_R) if rank else 16

    def sums(num_blocks: int) -> tuple:
        """Partial sums of dgain and din_scale, each None unless wanted."""
        wanted = (need_dgain, need_din_scale)
        return tuple(dh.new_empty(num_blocks, width, dtype=torch.float32) if needed else None for needed in wanted)

    def whole_rows() -> tuple:
        rows = _ROWS if need_dgain or need_din_scale else 1
        num_blocks, block_k = cdiv(num_rows, rows), max(16, 1 << (width - 1).bit_length())
        dgain, din_scale = sums(num_blocks)
        if not num_blocks or (dx is dgain is din_scale is None):
            return dgain, din_scale
        launch(
            _prologue_backward_rows_kernel, (num_blocks,), dh.device,
            dh, x, gain, rstd, in_scale, dresidual, dx, dgain, din_scale, num_rows, width, dh.stride(0), x.stride(0),
            0 if dresidual is None else dresidual.stride(0), dx.stride(0) if need_dx else 0,
            ROWS=rows, BLOCK_K=block_k, num_warps=warps_of_row(block_k), num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
        return dgain, din_scale

    def attempt(tile: Tile) -> tuple:
        num_blocks = cdiv(num_rows, tile.block_m)
        dgain, din_scale = sums(num_blocks)
        if num_rows and any(part is not None for part in (dx, dup, dgain, din_scale)):
            span = width if name == "rms_norm" else tile.block_n
            launch(
                _prologue_backward_kernel, (num_blocks, cdiv(width, span)), dh.device,
                dh, da, down, seed if p > 0.0 else None, x, up, gain, rstd, in_scale, dresidual, dx, dup, dgain,
                din_scale, num_rows, width, rank, span, dh.stride(0), da.stride(0) if rank else 0,
                down.stride(0) if rank else 0, 0 if x is None else x.stride(0), 0 if up is None else up.stride(0),
                0 if dresidual is None else dresidual.stride(0), dx.stride(0) if need_dx else 0,
                dup.stride(0) if need_dup else 0, inverse_keep_of(p), stream, threshold_of(p),
                PROLOGUE=name, BLOCK_M=tile.block_m, BLOCK_K=tile.block_n, BLOCK_R=block_r, **tile.options,
            )  # fmt: skip
        return dgain, din_scale

    arch, itemsize = architecture(dh.device), dh.element_size()
    wide = rank > 0 and down.element_size() > itemsize
    footprint = Footprint("prologue_backward", arch, itemsize, block_r if rank else 0, name, wide=wide)
    if (
        name == "rms_norm"
        and not rank
        and num_rows
        and width <= MAX_WHOLE_ROW
        and (need_dx or need_dgain or need_din_scale)
    ):
        dgain, din_scale = whole_rows()
    else:
        dgain, din_scale = fitted(footprint, tile or default_tile(rank, itemsize, arch, wide=wide), dh.device, attempt)
    return PrologueGrads(
        dx,
        dup,
        sum_partials(dgain, gain.dtype) if need_dgain else None,
        sum_partials(din_scale, in_scale.dtype) if need_din_scale else None,
    )

"""The prefix part of attention with trainable keys and values, merged with a main part computed by any flash kernel.

    L = logaddexp(L_main, logsumexp_p s_p),  s_p = scale q k_p,  o = o_main exp(L_main - L) + sum_p exp(s_p - L) v_p
    w = exp(s - L),  ds = scale w (do v_p - sum(do o)),  dq += ds k_p,  dk_p = sum ds q,  dv_p = sum w do

dk_p and dv_p sum over batch, query heads of a group and queries: split over programs, added in a fixed order. A long
prefix is merged block by block, one launch each: the merged part is the next launch's main part.
"""

import triton
import triton.language as tl

from mmpeft_kernels.launch import fitted, launch
from mmpeft_kernels.reduction import sum_partials
from mmpeft_kernels.row_chunks import num_multiprocessors, rows_per_chunk
from mmpeft_kernels.shared_memory import Footprint
from mmpeft_kernels.tile import Tile, architecture, cdiv, padded_rank


def default_tile(itemsize: int, arch: int | str) -> Tile:
    """block_m queries of a step and block_n prefix tokens of a launch: whole heads of both stay in registers."""
    if itemsize > 2:
        return Tile(block_m=16, block_n=16, num_warps=8)
    return Tile(block_m=32, block_n=32, num_warps=4 if isinstance(arch, str) else 8)  # AMD: 64 threads a warp


@triton.jit
def _scores(q, k_ptr, offs_p, offs_d, P, DH, scale):
    """scale q k_p^T [BLOCK_M, BLOCK_P] in float32, -inf beyond P, and k_p in q's dtype."""
    mask = (offs_p < P)[:, None] & (offs_d < DH)[None, :]
    k = tl.load(k_ptr + offs_p[:, None] * DH + offs_d[None, :], mask=mask, other=0.0).to(q.dtype)
    scores = tl.dot(q, k.T, input_precision="ieee") * scale
    return tl.where((offs_p < P)[None, :], scores, float("-inf")), k


@triton.jit
def _prefix_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, alive_ptr, T, H, P, DH, group_size, first_p,
    stride_qb, stride_qh, stride_qt, stride_ob, stride_oh, stride_ot, stride_lb, stride_lh, stride_lt, scale,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_DH: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1) % H, (tl.program_id(1) // H).to(tl.int64)
    offs_t = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_p, offs_d = first_p + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_DH)
    mask_t = offs_t < T
    mask = mask_t[:, None] & (offs_d < DH)[None, :]
    kv = head // group_size * P * DH
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    q = tl.load(q_base + offs_t[:, None] * stride_qt + offs_d[None, :], mask=mask, other=0.0)
    scores, _ = _scores(q, k_ptr + kv, offs_p, offs_d, P, DH, scale)

    lse_row = lse_ptr + batch * stride_lb + head * stride_lh + offs_t * stride_lt
    lse_main = tl.load(lse_row, mask=mask_t, other=0.0)
    out_block = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh + offs_t[:, None] * stride_ot
    out_main = tl.load(out_block + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if alive_ptr is not None:
        # Kernels report an arbitrary lse, and may report nan, for queries that attend to nothing: they count as none.
        alive = tl.load(alive_ptr + batch * T + offs_t, mask=mask_t, other=0) != 0
        lse_main = tl.where(alive, lse_main, float("-inf"))
        out_main = tl.where(alive[:, None], out_main, 0.0)
    highest = tl.maximum(tl.max(scores, axis=1), lse_main)
    total = tl.sum(tl.exp(scores - highest[:, None]), axis=1) + tl.exp(lse_main - highest)
    lse = highest + tl.log(total)
    weights = tl.exp(scores - lse[:, None]).to(q.dtype)
    v_mask = (offs_p < P)[:, None] & (offs_d < DH)[None, :]
    v = tl.load(v_ptr + kv + offs_p[:, None] * DH + offs_d[None, :], mask=v_mask, other=0.0).to(q.dtype)
    out = tl.dot(weights, v, out_main * tl.exp(lse_main - lse)[:, None], input_precision="ieee")
    tl.store(out_block + offs_d[None, :], out.to(q.dtype), mask=mask)
    tl.store(lse_row, lse, mask=mask_t)


@triton.jit
def _prefix_backward_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, dkv_ptr,
    T, H, P, DH, group_size, rows_per_chunk, num_chunks, first_p,
    stride_gb, stride_gh, stride_gt, stride_qb, stride_qh, stride_qt, stride_ob, stride_oh, stride_ot,
    stride_lb, stride_lh, stride_lt, stride_dqb, stride_dqh, stride_dqt, scale,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_DH: tl.constexpr,
):  # fmt: skip
    pid_chunk = tl.program_id(0)
    head, batch = tl.program_id(1) % H, (tl.program_id(1) // H).to(tl.int64)
    kv_head = head // group_size
    offs_p, offs_d = first_p + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_DH)
    mask_p, mask_d = offs_p < P, offs_d < DH
    kv = kv_head * P * DH + offs_p[:, None] * DH + offs_d[None, :]
    kv_mask = mask_p[:, None] & mask_d[None, :]
    dtype = q_ptr.dtype.element_ty
    v = tl.load(v_ptr + kv, mask=kv_mask, other=0.0).to(dtype)
    dk = tl.zeros([BLOCK_P, BLOCK_DH], tl.float32)
    dv = tl.zeros([BLOCK_P, BLOCK_DH], tl.float32)
    wide_head = head.to(tl.int64)
    start = pid_chunk * rows_per_chunk
    for row in range(start, tl.minimum(start + rows_per_chunk, T), BLOCK_M):
        offs_t = row + tl.arange(0, BLOCK_M)
        mask_t = offs_t < T
        mask = mask_t[:, None] & mask_d[None, :]
        q_block = q_ptr + batch * stride_qb + wide_head * stride_qh + offs_t[:, None] * stride_qt
        q = tl.load(q_block + offs_d[None, :], mask=mask, other=0.0)
        dout_block = dout_ptr + batch * stride_gb + wide_head * stride_gh + offs_t[:, None] * stride_gt
        dout = tl.load(dout_block + offs_d[None, :], mask=mask, other=0.0)
        out_block = out_ptr + batch * stride_ob + wide_head * stride_oh + offs_t[:, None] * stride_ot
        out = tl.load(out_block + offs_d[None, :], mask=mask, other=0.0)
        lse = tl.load(
            lse_ptr + batch * stride_lb + head * stride_lh + offs_t * stride_lt, mask=mask_t, other=float("inf")
        )

        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
        scores, k = _scores(q, k_ptr + kv_head * P * DH, offs_p, offs_d, P, DH, scale)
        weights = tl.exp(scores - lse[:, None])
        dweights = tl.dot(dout, v.T, input_precision="ieee")
        dscores = (weights * (dweights - delta[:, None]) * scale).to(dtype)
        dv = tl.dot(weights.to(dtype).T, dout, dv, input_precision="ieee")
        dq_block = dq_ptr + batch * stride_dqb + wide_head * stride_dqh + offs_t[:, None] * stride_dqt
        dq_main = tl.load(dq_block + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        dq = tl.dot(dscores, k, dq_main, input_precision="ieee")
        tl.store(dq_block + offs_d[None, :], dq.to(dtype), mask=mask)
        dk = tl.dot(dscores.T, q, dk, input_precision="ieee")

    # A partial for each (batch, head of the group, chunk), laid out so that key/value heads are kept apart.
    num_groups = H // group_size
    part = (batch * group_size + head % group_size) * num_chunks + pid_chunk
    partial = dkv_ptr + part * 2 * num_groups * P * DH + kv
    tl.store(partial, dk, mask=kv_mask)
    tl.store(partial + num_groups * P * DH, dv, mask=kv_mask)


def _check(prefix_k, q):
    num_kv_heads, num_prefix, _ = prefix_k.shape
    if not num_prefix or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"prefix: expected at least one virtual token and key/value heads that divide {q.shape[1]} heads, "
            f"got prefix keys {list(prefix_k.shape)}"
        )


def merge_prefix_(q, prefix_k, prefix_v, out, lse, *, scale, alive=None, tile: Tile | None = None) -> None:
    """Turns `out` and `lse` of the main part into those of the whole softmax, in place.

    q, out [B, H, T, DH], any strides but a unit one last; prefix_k, prefix_v [HK, P, DH] contiguous, any float dtype;
    lse [B, H, >= T] float32, any strides; alive [B, T] bool, contiguous: False where the main part attends to nothing.

    Raises:
        ValueError: an empty prefix, or heads that HK does not divide.
    """
    _check(prefix_k, q)
    batch, heads, num_queries, head_dim = q.shape
    num_kv_heads, num_prefix, _ = prefix_k.shape
    block_dh = padded_rank(head_dim)

    def attempt(tile: Tile) -> None:
        block_p = padded_rank(num_prefix, tile.block_n)
        for first_p in range(0, num_prefix if q.numel() else 0, block_p):
            launch(
                _prefix_kernel, (cdiv(num_queries, tile.block_m), batch * heads), q.device,
                q, prefix_k, prefix_v, out, lse, alive if first_p == 0 else None,
                num_queries, heads, num_prefix, head_dim, heads // num_kv_heads, first_p,
                *q.stride()[:3], *out.stride()[:3], *lse.stride(), scale,
                BLOCK_M=tile.block_m, BLOCK_P=block_p, BLOCK_DH=block_dh, **tile.options,
            )  # fmt: skip

    arch, itemsize = architecture(q.device), q.element_size()
    fitted(Footprint("prefix", arch, itemsize, block_dh), tile or default_tile(itemsize, arch), q.device, attempt)


def prefix_backward_(dout, q, prefix_k, prefix_v, out, lse, dq, *, scale, tile: Tile | None = None):
    """Adds the prefix part's dq to `dq` in place; returns dprefix_k, dprefix_v [HK, P, DH] in the prefix's dtype.

    dout, q, dq and the merged out [B, H, T, DH], any strides but a unit one last; merged lse [B, H, >= T] float32;
    the rest as in `merge_prefix_`.
    """
    import torch

    _check(prefix_k, q)
    batch, heads, num_queries, head_dim = q.shape
    num_kv_heads, num_prefix, _ = prefix_k.shape
    block_dh = padded_rank(head_dim)

    def attempt(tile: Tile):
        block_p = padded_rank(num_prefix, tile.block_n)
        chunk = rows_per_chunk(num_queries, tile.block_m, batch * heads, num_multiprocessors(q.device))
        num_chunks = cdiv(num_queries, chunk)
        num_parts = batch * (heads // num_kv_heads) * num_chunks
        dkv = q.new_empty(num_parts, 2, num_kv_heads, num_prefix, head_dim, dtype=torch.float32)
        for first_p in range(0, num_prefix if q.numel() else 0, block_p):
            launch(
                _prefix_backward_kernel, (num_chunks, batch * heads), q.device,
                dout, q, prefix_k, prefix_v, out, lse, dq, dkv,
                num_queries, heads, num_prefix, head_dim, heads // num_kv_heads, chunk, num_chunks, first_p,
                *dout.stride()[:3], *q.stride()[:3], *out.stride()[:3], *lse.stride(), *dq.stride()[:3], scale,
                BLOCK_M=tile.block_m, BLOCK_P=block_p, BLOCK_DH=block_dh, **tile.options,
            )  # fmt: skip
        return dkv

    arch, itemsize = architecture(q.device), q.element_size()
    tile = tile or default_tile(itemsize, arch)
    dkv = fitted(Footprint("prefix_backward", arch, itemsize, block_dh), tile, q.device, attempt)
    dk, dv = sum_partials(dkv, torch.promote_types(prefix_k.dtype, prefix_v.dtype))
    return dk.to(prefix_k.dtype), dv.to(prefix_v.dtype)

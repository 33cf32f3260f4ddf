"""Causal attention over raw projections: scale, head norm, rotation and a trainable prefix in one op.

    q', k', v' = rotate(head_norm(q * l_q)), rotate(head_norm(k * l_k)), v * l_v
    o = softmax([scale q' k_p^T, scale q' k'^T + mask]) [v_p; v']

q, k, v are kept as the GEMM gave them; the elementwise steps are redone in the backward, so IA3 (Liu et al. 2022) on
k and v and Qwen3's head norms save nothing extra and dl is exact where l = 0. Prefix keys are not rotated and every
query sees them (prefix-tuning, Li & Liang 2021, as in arXiv 2406.05130); the two parts are merged by log-sum-exp:

    L = logaddexp(L_main, L_prefix),  o = o_main exp(L_main - L) + sum_p exp(s_p - L) v_p
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.flash import FlashResult, flash_backward, flash_forward
from mmpeft_fast.ops.norms import rms_norm_backward, rms_norm_forward, rms_norm_ref
from mmpeft_fast.ops.rotary import rotate, rotate_backward


class HeadTransform(NamedTuple):
    """What happens to one of q, k, v between its GEMM and the softmax, in this order.

    scale: [heads * DH] or None (IA3); gain: [DH] or None (head norm with `eps`); rotated for q and k.
    """

    scale: Tensor | None = None
    gain: Tensor | None = None


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))  # [B, T, heads, DH]


def _transform_ref(x: Tensor, how: HeadTransform, cos, sin, head_dim: int, eps: float) -> Tensor:
    x = _heads(x if how.scale is None else (x * how.scale).to(x.dtype), head_dim)
    x = x if how.gain is None else rms_norm_ref(x, how.gain, eps)
    return x if cos is None else rotate(x, cos, sin)


def _transform(x: Tensor, how: HeadTransform, cos, sin, head_dim: int, eps: float) -> Tensor:
    """[B, T, heads * DH] -> [B, heads, T, DH], a transposed view: the kernel lays its output out alike."""
    x = _heads(x if how.scale is None else (x * how.scale).to(x.dtype), head_dim)
    if how.gain is not None:
        x, _ = rms_norm_forward(x, how.gain, eps)
    return (x if cos is None else rotate(x, cos, sin)).transpose(1, 2)


def _transform_backward(
    dx: Tensor, x: Tensor, how: HeadTransform, cos, sin, head_dim: int, eps: float, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d of (x, scale, gain) from the gradient dx [B, heads, T, DH] of the transformed tensor."""
    need_x, need_scale, need_gain = needs
    if not any(needs):
        return None, None, None
    dx = dx.transpose(1, 2)
    if cos is not None:
        dx = rotate_backward(dx, cos, sin)
    dgain = dscale = None
    if how.gain is not None:
        scaled = _heads(x if how.scale is None else (x * how.scale).to(x.dtype), head_dim)
        _, rstd = rms_norm_forward(scaled, how.gain, eps)
        dx, dgain = rms_norm_backward(dx, scaled, how.gain, rstd, need_dx=need_x or need_scale, need_dgain=need_gain)
    if dx is not None:
        dx = dx.flatten(-2)
        if how.scale is not None:
            if need_scale:
                wide = accumulate_dtype(x.dtype)
                dscale = (dx.to(wide) * x.to(wide)).flatten(0, -2).sum(0).to(how.scale.dtype)
            dx = (dx * how.scale).to(x.dtype) if need_x else None
    return dx, dscale, dgain


def _prefix_scores(q: Tensor, prefix_k: Tensor, scale: float) -> Tensor:
    """[B, HK, G, T, P] in the accumulation dtype, G query heads to a key/value head."""
    grouped = q.unflatten(1, (prefix_k.shape[0], -1))
    return torch.einsum("bkgtd,kpd->bkgtp", grouped, prefix_k).to(accumulate_dtype(q.dtype)) * scale


def _merge_prefix(
    main: FlashResult, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, mask: Tensor | None, scale: float
) -> FlashResult:
    num_queries = q.shape[2]
    scores = _prefix_scores(q, prefix_k, scale)
    lse_prefix = torch.logsumexp(scores, dim=-1).flatten(1, 2)  # [B, H, T]
    out_main, lse_main = main.out, main.lse[..., :num_queries]
    if mask is not None:
        # Kernels report an arbitrary lse for queries that may attend to nothing (padding): it has to count as none.
        alive = mask.any(-1) if mask.dtype == torch.bool else (mask > float("-inf")).any(-1)
        lse_main = lse_main.masked_fill(~alive, float("-inf"))
        out_main = out_main.masked_fill(~alive[..., None], 0.0)
    lse = torch.logaddexp(lse_main, lse_prefix.to(lse_main.dtype))
    weights = torch.exp(scores - lse.unflatten(1, (prefix_k.shape[0], -1))[..., None].to(scores.dtype))
    from_prefix = torch.einsum("bkgtp,kpd->bkgtd", weights.to(q.dtype), prefix_v).flatten(1, 2)
    out = torch.empty_like(main.out)
    torch.addcmul(from_prefix, out_main, torch.exp(lse_main - lse)[..., None].to(q.dtype), out=out)
    if main.lse.shape[-1] != num_queries:  # the efficient CUDA kernel pads its lse
        lse = torch.cat((lse, main.lse[..., num_queries:]), dim=-1)
    return FlashResult(out, lse, main.extra)


def _prefix_backward(
    dout: Tensor, q: Tensor, prefix_k: Tensor, prefix_v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The prefix part's dq [B, H, T, DH], and dK_p, dV_p [HK, P, DH] reduced over batch, group and queries."""
    kv_heads = prefix_k.shape[0]
    scores = _prefix_scores(q, prefix_k, scale)
    wide = scores.dtype
    weights = torch.exp(scores - lse[..., : q.shape[2]].unflatten(1, (kv_heads, -1))[..., None].to(wide))
    grouped_dout = dout.unflatten(1, (kv_heads, -1))
    delta = (dout.to(wide) * out.to(wide)).sum(-1).unflatten(1, (kv_heads, -1))
    dweights = torch.einsum("bkgtd,kpd->bkgtp", grouped_dout, prefix_v).to(wide)
    dscores = (weights * (dweights - delta[..., None]) * scale).to(q.dtype)
    dq = torch.einsum("bkgtp,kpd->bkgtd", dscores, prefix_k).flatten(1, 2)
    dprefix_k = torch.einsum("bkgtp,bkgtd->kpd", dscores, q.unflatten(1, (kv_heads, -1)))
    dprefix_v = torch.einsum("bkgtp,bkgtd->kpd", weights.to(q.dtype), grouped_dout)
    return dq, dprefix_k, dprefix_v


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q, k, v, q_scale, k_scale, v_scale, q_gain, k_gain, prefix_k, prefix_v, cos, sin, cos_q, sin_q, mask,
        head_dim, eps, scale, causal,
    ):  # fmt: skip
        cast = None if prefix_k is None else (prefix_k.to(q.dtype), prefix_v.to(q.dtype))
        heads_q = _transform(q, HeadTransform(q_scale, q_gain), cos_q, sin_q, head_dim, eps)
        heads_k = _transform(k, HeadTransform(k_scale, k_gain), cos, sin, head_dim, eps)
        heads_v = _transform(v, HeadTransform(v_scale), None, None, head_dim, eps)
        result = flash_forward(heads_q, heads_k, heads_v, mask, causal, scale)
        if cast is not None:
            result = _merge_prefix(result, heads_q, *cast, mask, scale)
        # [B, T, H, DH] in memory where the kernel keeps q's layout, so this is a view.
        out = result.out.transpose(1, 2).flatten(-2)
        tensors = [item for item in result.extra if isinstance(item, Tensor)]
        ctx.save_for_backward(
            q, k, v, q_scale, k_scale, v_scale, q_gain, k_gain, prefix_k, prefix_v, cos, sin, cos_q, sin_q, mask,
            out, result.lse, *tensors,
        )  # fmt: skip
        ctx.extra = [None if isinstance(item, Tensor) else item for item in result.extra]
        ctx.options = head_dim, eps, scale, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (
            q, k, v, q_scale, k_scale, v_scale, q_gain, k_gain, prefix_k, prefix_v, cos, sin, cos_q, sin_q, mask,
            out, lse, *tensors,
        ) = ctx.saved_tensors  # fmt: skip
        head_dim, eps, scale, causal = ctx.options
        tensors = iter(tensors)
        extra = tuple(next(tensors) if item is None else item for item in ctx.extra)
        how_q, how_k, how_v = HeadTransform(q_scale, q_gain), HeadTransform(k_scale, k_gain), HeadTransform(v_scale)
        heads_q = _transform(q, how_q, cos_q, sin_q, head_dim, eps)
        heads_k = _transform(k, how_k, cos, sin, head_dim, eps)
        heads_v = _transform(v, how_v, None, None, head_dim, eps)
        heads_out, heads_dout = _heads(out, head_dim).transpose(1, 2), _heads(dout, head_dim).transpose(1, 2)
        result = FlashResult(heads_out, lse, extra)
        dq, dk, dv = flash_backward(heads_dout, heads_q, heads_k, heads_v, result, mask, causal, scale)
        dprefix_k = dprefix_v = None
        if prefix_k is not None:
            dq_prefix, dprefix_k, dprefix_v = _prefix_backward(
                heads_dout, heads_q, prefix_k.to(q.dtype), prefix_v.to(q.dtype), heads_out, lse, scale
            )
            dq = dq + dq_prefix
            dprefix_k, dprefix_v = dprefix_k.to(prefix_k.dtype), dprefix_v.to(prefix_v.dtype)
        need = ctx.needs_input_grad
        dq, dq_scale, dq_gain = _transform_backward(
            dq, q, how_q, cos_q, sin_q, head_dim, eps, (need[0], need[3], need[6])
        )
        dk, dk_scale, dk_gain = _transform_backward(dk, k, how_k, cos, sin, head_dim, eps, (need[1], need[4], need[7]))
        dv, dv_scale, _ = _transform_backward(dv, v, how_v, None, None, head_dim, eps, (need[2], need[5], False))
        return dq, dk, dv, dq_scale, dk_scale, dv_scale, dq_gain, dk_gain, dprefix_k, dprefix_v, *(None,) * 9


def _causal_rows(rows: Tensor, num_keys: int) -> Tensor:
    """Which keys the queries at positions `rows` [B, C] may attend to: [B, 1, C, T] bool."""
    return (torch.arange(num_keys, device=rows.device) <= rows[..., None])[:, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    scale: float | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    q_how: HeadTransform = HeadTransform(),  # noqa: B008 - an immutable tuple
    k_how: HeadTransform = HeadTransform(),  # noqa: B008
    v_scale: Tensor | None = None,
    eps: float = 1e-6,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention from raw projections.

    Args:
        q: [B, T, H * DH] as the linear layer gave it, or [B, C, H * DH] at positions `rows` [B, C].
        k, v: [B, T, HK * DH]; HK divides H.
        cos, sin: [B or 1, T, DH] rotation of all T positions (of q's rows too, gathered here).
        scale: of the scores; DH ** -0.5 when None.
        mask: None (causal), or [B or 1, 1, T, T] bool (True = may attend) or additive, which replaces causality.
        q_how, k_how: scale [heads * DH] and head-norm gain [DH] of q and k; v_scale: [HK * DH].
        eps: of the head norms.
        prefix: trainable keys and values, each [HK, P, DH], any float dtype.

    Returns:
        [B, T or C, H * DH] in q's dtype.

    Raises:
        ValueError: widths do not fit together.
    """
    q_width, kv_width = q.shape[-1], k.shape[-1]
    if q_width % head_dim or kv_width % head_dim or q_width % kv_width or k.shape != v.shape:
        raise ValueError(
            f"attention: expected q [B, T, H*{head_dim}] and k, v [B, T, HK*{head_dim}] with HK dividing H, "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    num_queries = k.shape[1] if rows is None else rows.shape[1]
    if q.shape[1] != num_queries:
        raise ValueError(f"attention: expected {num_queries} query positions, got q {list(q.shape)}")
    if prefix is not None and any(
        part.dim() != 3 or part.shape[0] != kv_width // head_dim or part.shape[2] != head_dim for part in prefix
    ):
        raise ValueError(
            f"attention: expected prefix keys and values [{kv_width // head_dim}, P, {head_dim}], "
            f"got {[list(part.shape) for part in prefix]}"
        )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [B or 1, T, 1, DH]
    cos_q, sin_q = cos, sin
    if rows is not None:
        gather = rows[:, :, None, None]
        cos_q, sin_q = (
            torch.take_along_dim(part.expand(rows.shape[0], *part.shape[1:]), gather, dim=1) for part in (cos, sin)
        )
        mask = (
            _causal_rows(rows, k.shape[1])
            if mask is None
            else torch.take_along_dim(mask.expand(rows.shape[0], -1, -1, -1), rows[:, None, :, None], dim=2)
        )
    prefix_k, prefix_v = prefix if prefix is not None else (None, None)
    return _Attention.apply(
        q, k, v, q_how.scale, k_how.scale, v_scale, q_how.gain, k_how.gain, prefix_k, prefix_v,
        cos, sin, cos_q, sin_q, mask, head_dim, eps, head_dim**-0.5 if scale is None else scale, mask is None,
    )  # fmt: skip


def concat_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    causal: bool,
    prefix: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Attention by concatenating the prefix to keys and values: the definition, and the path of cached decoding.

    q [B, H, Tq, DH]; k, v [B, HK, Tk, DH], transformed already; mask as in `attention`, `causal` without one;
    prefix [HK, P, DH] pair. Returns [B, H, Tq, DH]. Plain differentiable torch.
    """
    if prefix is not None:
        num_virtual = prefix[0].shape[1]
        if mask is None and causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril_()[None, None]
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (num_virtual, 0), value=True if mask.dtype == torch.bool else 0.0)
        causal = False
        k, v = (
            torch.cat((extra.to(part.dtype).expand(part.shape[0], -1, -1, -1), part), dim=2)
            for extra, part in zip(prefix, (k, v), strict=True)
        )
    groups = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)


def transform_heads(x: Tensor, how: HeadTransform, cos: Tensor | None, sin: Tensor | None, head_dim: int, eps: float):
    """[B, T, heads * DH] -> [B, heads, T, DH] by plain differentiable torch; cos, sin [B or 1, T, DH] or None."""
    cos, sin = (None, None) if cos is None else (cos.unsqueeze(-2), sin.unsqueeze(-2))
    return _transform_ref(x, how, cos, sin, head_dim, eps).transpose(1, 2)


def attention_ref(
    q, k, v, cos, sin, *, head_dim, scale=None, mask=None, rows=None, q_how=HeadTransform(), k_how=HeadTransform(),  # noqa: B008
    v_scale=None, eps=1e-6, prefix=None,
) -> Tensor:  # fmt: skip
    """The definition of `attention` in plain differentiable torch: all queries, then the wanted rows."""
    heads_k = transform_heads(k, k_how, cos, sin, head_dim, eps)
    heads_v = transform_heads(v, HeadTransform(v_scale), None, None, head_dim, eps)
    if rows is not None:
        cos, sin = (torch.take_along_dim(part.expand(len(rows), -1, -1), rows[..., None], dim=1) for part in (cos, sin))
        full = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril() if mask is None else mask
        mask = torch.take_along_dim(full.expand(len(rows), 1, *full.shape[-2:]), rows[:, None, :, None], dim=2)
    heads_q = transform_heads(q, q_how, cos, sin, head_dim, eps)
    out = concat_prefix_attention(
        heads_q, heads_k, heads_v, scale=head_dim**-0.5 if scale is None else scale, mask=mask, causal=mask is None,
        prefix=prefix,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(-2)

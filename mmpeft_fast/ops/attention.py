"""Causal attention over raw projections: scale, head norm, rotation and a trainable prefix in one op.

    q', k', v' = rotate(head_norm(q * l_q)), rotate(head_norm(k * l_k)), v * l_v
    o = softmax([scale q' k_p^T, scale q' k'^T + mask]) [v_p; v']

q, k, v are kept as they go into the softmax, or, where a scale or a head norm has to be differentiated (IA3, Liu et al.
2022; Qwen3), as the GEMM gave them: the elementwise steps are then redone, so that dl is exact where l = 0. Prefix keys
are not rotated and every query sees them (prefix-tuning, Li & Liang 2021, as in arXiv 2406.05130); the two parts are
merged by log-sum-exp:

    L = logaddexp(L_main, L_prefix),  o = o_main exp(L_main - L) + sum_p exp(s_p - L) v_p
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.documents import Documents, check_documents
from mmpeft_fast.ops import fused_linear, tape
from mmpeft_fast.ops.attention_schedule import (
    NUM_DIFFERENTIABLE,
    NUM_TENSORS,
    AttentionCall,
    AttentionKept,
    AttentionRunner,
)
from mmpeft_fast.ops.autocast import autocast_dtype, without_autocast
from mmpeft_fast.ops.flash import shapes_repeat
from mmpeft_fast.ops.fused_linear import made_again, makers_of
from mmpeft_fast.ops.kernel_set import HeadTransform
from mmpeft_fast.ops.norms import rms_norm_ref
from mmpeft_fast.ops.opaque import traceable
from mmpeft_fast.ops.opaque_attention import OpaqueAttentionRunner
from mmpeft_fast.ops.providers import forced_provider, kernel_set
from mmpeft_fast.ops.rotary import rotate
from mmpeft_fast.ops.rows import take_rows

__all__ = ["HeadTransform", "attention", "attention_ref", "concat_prefix_attention", "transform_heads"]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim))  # [B, T, heads, DH]


def _transform_ref(x: Tensor, how: HeadTransform, cos, sin, head_dim: int, eps: float) -> Tensor:
    x = _heads(x if how.scale is None else (x * how.scale).to(x.dtype), head_dim)
    x = x if how.gain is None else rms_norm_ref(x, how.gain, eps)
    return x if cos is None else rotate(x, cos, sin)


class _Attention(torch.autograd.Function):
    """Arguments after `runner` (None: the schedule on the kernels of the moment), `overwrite` and `makers` (of q, k and
    v, which are then made again in the backward): those of an `AttentionCall`. Keeps q, k and v as they went into the
    softmax; as the GEMM gave them where a scale is trained or a head norm has to be differentiated."""

    @staticmethod
    def forward(ctx, runner, overwrite, makers, *arguments):
        tensors, ctx.options = arguments[:NUM_TENSORS], arguments[NUM_TENSORS:]
        ctx.runner = runner or AttentionRunner(kernel_set("attention", tensors[0]))
        arguments = ctx.options, _needs(ctx), overwrite
        kept = tape.run_step(_forward, ctx.runner, arguments, tensors, state=shapes_repeat())
        ctx.is_raw, ctx.more = kept.is_raw, (kept.joint, kept.kernel)
        ctx.makers, ctx.overwrite, ctx.shapes = makers, overwrite, [x.shape for x in tensors[:3]]
        ctx.save_for_backward(
            *(kept[:3] if makers is None else (None,) * 3), *tensors[3:], kept.out, kept.lse, *kept.extra
        )
        return kept.out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        saved = ctx.saved_tensors
        if ctx.makers is not None:
            with fused_linear.recomputing():
                made = [x.view(shape) for x, shape in zip(made_again(ctx.makers), ctx.shapes, strict=True)]
                arguments = ctx.options, ctx.is_raw, ctx.overwrite
                made = tape.run_step(_keep_again, ctx.runner, arguments, (*made, *saved[3:NUM_TENSORS]))
            saved = (*made, *saved[3:])
        arguments = ctx.options, _needs(ctx), ctx.is_raw, ctx.more
        grads = tape.run_step(_backward, ctx.runner, arguments, (dout, *saved), state=shapes_repeat())
        return None, None, None, *grads, *(None,) * (len(AttentionCall._fields) - NUM_DIFFERENTIABLE)


def _forward(runner, options: tuple, need: tuple[bool, ...], overwrite: bool, *tensors) -> AttentionKept:
    return runner.forward(AttentionCall(*tensors, *options), need, overwrite)


def _keep_again(runner, options: tuple, is_raw: tuple[bool, ...], overwrite: bool, *tensors) -> list[Tensor]:
    return runner.keep_again(AttentionCall(*tensors, *options), is_raw, overwrite)


def _backward(runner, options: tuple, need: tuple[bool, ...], is_raw: tuple, more: tuple, dout, *saved) -> tuple:
    tensors, (out, lse, *extra) = saved[:NUM_TENSORS], saved[NUM_TENSORS:]
    kept = AttentionKept(*tensors[:3], is_raw, out, lse, tuple(extra), *more)
    return runner.backward(AttentionCall(*tensors, *options), kept, dout, need)


def _needs(ctx) -> tuple[bool, ...]:
    return ctx.needs_input_grad[3 : 3 + NUM_DIFFERENTIABLE]


def _traceable_attention(provider, tensors, *options) -> Tensor:
    return _Attention.apply(OpaqueAttentionRunner(provider), False, None, *tensors, *options)


traceable(
    "attention",
    "(str? provider, Tensor?[] tensors, int head_dim, float eps, float scale, bool causal) -> Tensor",
    _traceable_attention,
)


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
    documents: Documents | None = None,
    q_how: HeadTransform = HeadTransform(),  # noqa: B008 - an immutable tuple
    k_how: HeadTransform = HeadTransform(),  # noqa: B008
    v_scale: Tensor | None = None,
    eps: float = 1e-6,
    prefix: tuple[Tensor, Tensor] | None = None,
    overwrite: bool = False,
    recompute: bool = False,
) -> Tensor:
    """Causal attention from raw projections.

    Args:
        q: [B, T, H * DH] as the linear layer gave it, or [B, C, H * DH] at positions `rows` [B, C].
        k, v: [B, T, HK * DH]; HK divides H.
        cos, sin: [B or 1, T, DH] rotation of all T positions (of q's rows too, gathered here), in q's dtype or a wider
            one, in which q and k are then rotated.
        scale: of the scores; DH ** -0.5 when None.
        mask: None (causal), or [B or 1, 1, T, T] bool (True = may attend) or additive, which replaces causality.
        documents: of the B rows of T tokens, in place of a mask: which tokens see which (`documents.py`).
        q_how, k_how: scale [heads * DH] and head-norm gain [DH] of q and k; v_scale: [HK * DH].
        eps: of the head norms.
        prefix: trainable keys and values, each [HK, P, DH], any float dtype.
        overwrite: q and k are nobody else's: where they are columns of a wider buffer, which lives as long as any of
            its columns, what the backward needs may be written there instead of elsewhere.
        recompute: as in `fused_linear`, of q, k and v.

    Returns:
        [B, T or C, H * DH] in q's dtype; under autocast in autocast's.

    Raises:
        ValueError: widths do not fit together, or documents and a mask.
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
    if documents is not None:
        if mask is not None:
            raise ValueError("attention: expected documents or a mask, got both")
        check_documents(documents, k.shape[0], k.shape[1])
    dtype = autocast_dtype(q)
    if dtype is not None:
        q, k, v = (part.to(dtype) for part in (q, k, v))
    cos_q, sin_q = cos, sin
    if rows is not None:
        cos_q, sin_q = take_rows(cos, rows), take_rows(sin, rows)
        if documents is not None:
            mask = documents.mask_of(rows, k.shape[1])
        else:
            mask = _causal_rows(rows, k.shape[1]) if mask is None else take_rows(mask[:, 0], rows)[:, None]
    elif documents is not None and torch.compiler.is_compiling():
        mask = documents.mask(k.shape[1], k.device)
    prefix_k, prefix_v = prefix if prefix is not None else (None, None)
    tensors = (
        q, k, v, q_how.scale, k_how.scale, v_scale, q_how.gain, k_how.gain, prefix_k, prefix_v,
        cos, sin, cos_q, sin_q, mask,
    )  # fmt: skip
    options = head_dim, eps, head_dim**-0.5 if scale is None else scale, mask is None
    with without_autocast(q):
        if torch.compiler.is_compiling():
            return torch.ops.mmpeft_fast.attention(forced_provider(), list(tensors), *options)
        makers = makers_of((q, k, v)) if recompute and torch.is_grad_enabled() else None
        return _Attention.apply(None, overwrite, makers, *tensors, *options, documents if mask is None else None)


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
        cos, sin = take_rows(cos, rows), take_rows(sin, rows)
        full = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril() if mask is None else mask
        mask = take_rows(full.expand(len(rows), 1, *full.shape[-2:])[:, 0], rows)[:, None]
    heads_q = transform_heads(q, q_how, cos, sin, head_dim, eps)
    out = concat_prefix_attention(
        heads_q, heads_k, heads_v, scale=head_dim**-0.5 if scale is None else scale, mask=mask, causal=mask is None,
        prefix=prefix,
    )  # fmt: skip
    return out.transpose(1, 2).flatten(-2)

"""The library's flash attention with its log-sum-exp, forward and backward, one entry for every device.

    lse = log sum_j exp(s_ij),  o = sum_j exp(s_ij - lse_i) v_j,  s = scale q k^T (+ mask)

The backward uses only exp(s - lse) and sum(do * o): called with the o and lse of a *larger* softmax that contains
these keys, it returns the exact gradients of this part. Attention with a trainable prefix rests on that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.ops.activations import accumulate_dtype

_aten = torch.ops.aten
# The CUDA flash kernels take half precision and head dimensions that are multiples of 8 up to 256; cuDNN's backward, on
# Hopper and later, up to 128.
_CUDA_FLASH_MAX_HEAD_DIM = 256
_CUDNN_MAX_HEAD_DIM, _CUDNN_CAPABILITY = 128, (9, 0)
_shapes_repeat: ContextVar[bool] = ContextVar("shapes repeat", default=False)


@contextmanager
def repeated_shapes() -> Iterator[None]:
    """Inside, shapes are known to come again: cuDNN's attention, which plans anew for every shape, may run."""
    token = _shapes_repeat.set(True)
    try:
        yield
    finally:
        _shapes_repeat.reset(token)


def shapes_repeat() -> bool:
    return _shapes_repeat.get()


class FlashResult(NamedTuple):
    """out [B, H, Tq, DH] (laid out like q), lse [B, H, Tq], and the tensors that the kernel's own backward wants
    besides (the state of a random generator, though nothing is dropped); kernel: whose these are, None where that of
    the same q, k and mask."""

    out: Tensor
    lse: Tensor
    extra: tuple[Tensor, ...]
    kernel: str | None = None


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask (True = may attend) as 0 / -inf in `dtype`; float masks are cast."""
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _may_use_cudnn(q: Tensor) -> bool:
    return (
        shapes_repeat()
        and q.device.type == "cuda"
        and q.shape[-1] <= _CUDNN_MAX_HEAD_DIM
        and torch.backends.cuda.cudnn_sdp_enabled()
        and torch.backends.cudnn.is_available()
        and not torch.are_deterministic_algorithms_enabled()
        and torch.cuda.get_device_capability(q.device) >= _CUDNN_CAPABILITY
    )


def has_flash_kernel(q: Tensor) -> bool:
    """Whether the library's flash attention on a GPU takes queries like q."""
    half, head_dim = q.dtype in (torch.float16, torch.bfloat16), q.shape[-1]
    return half and head_dim % 8 == 0 and head_dim <= _CUDA_FLASH_MAX_HEAD_DIM


def _kernel(q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    if not (q.numel() and k.numel()):
        return "math"  # torch's CPU kernel divides by the number of queries
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type in ("cuda", "meta"):
        if mask is None and has_flash_kernel(q):
            return "cudnn" if _may_use_cudnn(q) else "cuda_flash"
        if q.dtype != torch.float64 and q.shape[-1] % 8 == 0:
            return "cuda_efficient"
    return "math"


def _unseen_share(mask: Tensor, lse: Tensor) -> Tensor:
    """What the gradient of each query's output [B, H, Tq, 1] has to be multiplied by: 1, but 1 / n for a query whose
    row of an additive mask is the dtype's most negative number at n keys and nowhere more (eager attention's mask at
    padding). Such a number absorbs the scores, so the query attends to those n keys alike; it absorbs log n in the
    log-sum-exp as well, so the kernels' backward takes exp(s - lse) = 1 for every key, not 1 / n."""
    most = mask.amax(-1, keepdim=True)
    absorbs = (most < -1 / torch.finfo(lse.dtype).eps ** 2) & torch.isfinite(most) & (lse[..., None] <= most / 2)
    return torch.where(absorbs, 1 / (mask == most).sum(-1, keepdim=True), 1.0)


def _expand_heads(x: Tensor, num_heads: int) -> Tensor:
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _sum_head_groups(dx: Tensor, num_kv_heads: int) -> Tensor:
    if dx.shape[1] == num_kv_heads:
        return dx
    return dx.unflatten(1, (num_kv_heads, -1)).sum(2)


def _padded_bias(mask: Tensor, q: Tensor, num_keys: int) -> Tensor:
    """The efficient kernel wants a bias [B, H, Tq, Tk] whose rows are 16-element aligned."""
    bias = torch.nn.functional.pad(additive_mask(mask, q.dtype), (0, -num_keys % 16))[..., :num_keys]
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], num_keys)


def _math_scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    wide = accumulate_dtype(q.dtype)
    scores = q.to(wide) @ _expand_heads(k, q.shape[1]).to(wide).mT * scale
    if causal:
        rows, cols = scores.shape[-2:]
        later = torch.ones(rows, cols, dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores if mask is None else scores + additive_mask(mask, wide)


def flash_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> FlashResult:
    """q [B, H, Tq, DH]; k, v [B, HK, Tk, DH], HK divides H; mask [B or 1, 1 or H, Tq, Tk] bool or additive, or None;
    `causal` (Tq = Tk) excludes a mask. Rows that may attend to nothing give out = 0; their lse is the kernel's."""
    kernel = _kernel(q, k, mask)
    if kernel == "cpu":
        bias = additive_mask(mask, q.dtype)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
        return FlashResult(out, lse, ())
    if kernel == "cuda_flash":
        out, lse, _, _, _, _, philox_seed, philox_offset, _ = _aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return FlashResult(out, lse, (philox_seed, philox_offset))
    if kernel == "cudnn":
        out, lse, _, _, _, _, philox_seed, philox_offset, _ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return FlashResult(out, lse.view(lse.shape[:3]), (philox_seed, philox_offset), kernel)
    if kernel == "cuda_efficient":
        heads = q.shape[1]
        bias = None if mask is None else _padded_bias(mask, q, k.shape[2])
        out, lse, *extra = _aten._scaled_dot_product_efficient_attention(
            q, _expand_heads(k, heads), _expand_heads(v, heads), bias, True, 0.0, causal, scale=scale
        )
        return FlashResult(out, lse, tuple(extra))
    scores = _math_scores(q, k, mask, causal, scale)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    out = (weights @ _expand_heads(v, q.shape[1]).to(weights.dtype)).to(q.dtype)
    return FlashResult(out, lse, ())


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: FlashResult,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes of q, k, v; `result` may hold the out and lse of a softmax over further keys."""
    out, lse, extra, kernel = result
    kernel = kernel or _kernel(q, k, mask)
    if mask is not None and mask.dtype != torch.bool and mask.numel():
        dout = (dout * _unseen_share(additive_mask(mask, q.dtype).to(lse.dtype), lse)).to(dout.dtype)
    if kernel == "cpu":
        bias = additive_mask(mask, q.dtype)
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    if kernel == "cuda_flash":
        # No cumulative lengths: these are sequences of one length, whose longest is that length.
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, *extra, scale=scale
        )
        return dq, dk, dv
    if kernel == "cudnn":
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], *extra, None, None, None, q.shape[2], k.shape[2], 0.0, causal,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    heads, kv_heads = q.shape[1], k.shape[1]
    if kernel == "cuda_efficient":
        bias = None if mask is None else _padded_bias(mask, q, k.shape[2])
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            dout,
            q,
            _expand_heads(k, heads),
            _expand_heads(v, heads),
            bias,
            out,
            lse,
            *extra,
            0.0,
            [True, True, True, False],
            causal,
            scale=scale,
        )
        return dq, _sum_head_groups(dk, kv_heads), _sum_head_groups(dv, kv_heads)
    scores = _math_scores(q, k, mask, causal, scale)
    wide = scores.dtype
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    dout_wide, k_wide, v_wide = dout.to(wide), _expand_heads(k, heads).to(wide), _expand_heads(v, heads).to(wide)
    delta = (dout_wide * out.to(wide)).sum(-1, keepdim=True)
    dscores = weights * (dout_wide @ v_wide.mT - delta)
    dq = (dscores @ k_wide * scale).to(q.dtype)
    dk = _sum_head_groups(dscores.mT @ q.to(wide) * scale, kv_heads).to(k.dtype)
    dv = _sum_head_groups(weights.mT @ dout_wide, kv_heads).to(v.dtype)
    return dq, dk, dv

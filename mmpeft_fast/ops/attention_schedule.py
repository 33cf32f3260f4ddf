"""The order in which attention calls the kernel set and the library's flash attention; the same for every provider."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.documents import Documents
from mmpeft_fast.ops import stacking
from mmpeft_fast.ops.documents_attention import documents_backward, documents_forward
from mmpeft_fast.ops.flash import FlashResult, flash_backward, flash_forward
from mmpeft_fast.ops.kernel_set import HeadTransform, Rotation


class AttentionCall(NamedTuple):
    """The arguments of `attention`, queries and masks gathered; autograd's order."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    cos: Tensor
    sin: Tensor
    cos_q: Tensor
    sin_q: Tensor
    mask: Tensor | None
    head_dim: int
    eps: float
    scale: float
    causal: bool
    documents: Documents | None = None

    @property
    def how(self) -> tuple[HeadTransform, HeadTransform, HeadTransform]:
        return (
            HeadTransform(self.q_scale, self.q_gain),
            HeadTransform(self.k_scale, self.k_gain),
            HeadTransform(self.v_scale),
        )

    @property
    def rotation(self) -> Rotation:
        return Rotation(self.cos, self.sin, self.cos_q, self.sin_q)


NUM_TENSORS = AttentionCall._fields.index("head_dim")
NUM_DIFFERENTIABLE = AttentionCall._fields.index("cos")


class AttentionKept(NamedTuple):
    """What a forward pass keeps for its backward besides the call's own tensors.

    q, k, v: as they went into the softmax, but as the GEMM gave them where `is_raw`; out [B, T, H * DH]; lse, extra: of
    flash attention; joint: dq, dk, dv are to be columns of one buffer; kernel: as in `FlashResult`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    is_raw: tuple[bool, bool, bool]
    out: Tensor
    lse: Tensor
    extra: tuple[Tensor, ...]
    joint: bool
    kernel: str | None = None


def as_heads(x: Tensor, head_dim: int) -> Tensor:
    """[B, T, heads * DH] as [B, heads, T, DH], a view."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _alive(mask: Tensor | None) -> Tensor | None:
    """[B or 1, 1, T]: which queries attend to any key at all."""
    if mask is None:
        return None
    return mask.any(-1) if mask.dtype == torch.bool else (mask > float("-inf")).any(-1)


def _transformed(kernels: ModuleType, call: AttentionCall, in_place: tuple[bool, bool]) -> tuple[Tensor, ...]:
    # `.data` has a version counter of its own: k and v, columns of the same buffer, are kept as they came.
    q, k = (x.data if may else x for x, may in zip((call.q, call.k), in_place, strict=True))
    return kernels.heads(
        q, k, call.v, call.how, call.rotation, head_dim=call.head_dim, eps=call.eps, overwrite=(*in_place, False)
    )


def forward(
    kernels: ModuleType, call: AttentionCall, in_place: tuple[bool, bool] = (False, False)
) -> tuple[tuple[Tensor, Tensor, Tensor], FlashResult]:
    """q, k, v [B, heads, T, DH] as they go into the softmax, and its result. in_place: q and k give their place to
    theirs."""
    transformed = _transformed(kernels, call, in_place)
    if call.documents is not None:
        result = documents_forward(*transformed, call.documents, call.scale)
    else:
        result = flash_forward(*transformed, call.mask, call.causal, call.scale)
    if call.prefix_k is not None:
        out, lse = kernels.merge_prefix(
            transformed[0], call.prefix_k, call.prefix_v, result.out, result.lse,
            scale=call.scale, alive=_alive(call.mask),
        )  # fmt: skip
        result = result._replace(out=out, lse=lse)
    return transformed, result


def backward(
    kernels: ModuleType, call: AttentionCall, kept: AttentionKept, dout: Tensor, need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of the call's first `NUM_DIFFERENTIABLE` tensors; need: which of them are wanted. The call's own
    q, k, v are not looked at."""
    head_dim, how, rotation = call.head_dim, call.how, call.rotation
    saved, again = kept[:3], (None,) * 3
    if any(kept.is_raw):
        again = kernels.heads(*saved, how, rotation, head_dim=head_dim, eps=call.eps)
    q, k, v = (
        redone if is_raw else as_heads(x, head_dim) for x, redone, is_raw in zip(saved, again, kept.is_raw, strict=True)
    )
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # that of a sum is one number
    out, dout = as_heads(kept.out, head_dim), as_heads(dout, head_dim)
    result = FlashResult(out, kept.lse, kept.extra, kept.kernel)
    if call.documents is not None:
        dq, dk, dv = documents_backward(dout, q, k, v, result, call.documents, call.scale)
    else:
        dq, dk, dv = flash_backward(dout, q, k, v, result, call.mask, call.causal, call.scale)
    dprefix_k = dprefix_v = None
    if call.prefix_k is not None:
        dq, dprefix_k, dprefix_v = kernels.prefix_backward(
            dout, q, call.prefix_k, call.prefix_v, out, kept.lse, dq, scale=call.scale
        )
    grads = kernels.heads_backward(
        (dq, dk, dv),
        tuple(x if is_raw else None for x, is_raw in zip(saved, kept.is_raw, strict=True)),
        how,
        rotation,
        head_dim=head_dim,
        eps=call.eps,
        needs=[(need[0], need[3], need[6]), (need[1], need[4], need[7]), (need[2], need[5], False)],
        out=stacking.empty_columns(saved) if kept.joint and all(need[:3]) else None,
    )
    (dq, dq_scale, dq_gain), (dk, dk_scale, dk_gain), (dv, dv_scale, _) = grads
    return dq, dk, dv, dq_scale, dk_scale, dv_scale, dq_gain, dk_gain, dprefix_k, dprefix_v


def _in_place(call: AttentionCall, is_raw: tuple[bool, ...], overwrite: bool) -> tuple[bool, bool]:
    """Whether q and k give their place to what is kept: columns of a wider buffer live as long as any of them."""
    q, k = (overwrite and not raw and x.stride(1) > x.shape[2] for x, raw in zip(call[:2], is_raw[:2], strict=True))
    return q, k


def _kept(call: AttentionCall, transformed: tuple[Tensor, ...], is_raw: tuple[bool, ...]) -> list[Tensor]:
    return [
        x if raw else done.transpose(1, 2).flatten(-2)
        for x, done, raw in zip(call[:3], transformed, is_raw, strict=True)
    ]


class AttentionRunner(NamedTuple):
    """The schedule on one kernel set."""

    kernels: ModuleType

    @property
    def is_taped(self) -> bool:
        """As of `schedule.Runner`."""
        return self.kernels.IS_TAPED

    def forward(self, call: AttentionCall, need: tuple[bool, ...], overwrite: bool) -> AttentionKept:
        """`overwrite`: as in `attention`. need: as in `backward`."""
        is_raw = tuple(
            need_scale or transform.gain is not None for need_scale, transform in zip(need[3:6], call.how, strict=True)
        )
        joint = stacking.as_columns(call[:3]) is not None
        transformed, result = forward(self.kernels, call, _in_place(call, is_raw, overwrite))
        kept = _kept(call, transformed, is_raw)
        # [B, T, H, DH] in memory where the kernel keeps q's layout, so this is a view.
        out = result.out.transpose(1, 2).flatten(-2)
        return AttentionKept(*kept, is_raw, out, result.lse, result.extra, joint, result.kernel)

    def keep_again(self, call: AttentionCall, is_raw: tuple[bool, ...], overwrite: bool) -> list[Tensor]:
        """q, k, v as `forward` keeps them."""
        if all(is_raw):
            return list(call[:3])
        return _kept(call, _transformed(self.kernels, call, _in_place(call, is_raw, overwrite)), is_raw)

    def backward(
        self, call: AttentionCall, kept: AttentionKept, dout: Tensor, need: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        return backward(self.kernels, call, kept, dout, need)

"""Attention's schedule as two opaque ops, one forward and one backward (`ops/opaque.py`).

q, k, v are kept as they came: nothing may be overwritten where a compiler decides what lives, and what went into the
softmax would be kept beside the buffer that v is a part of. The backward redoes scale, head norm and rotation.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.ops import attention_schedule, stacking
from mmpeft_fast.ops.attention_schedule import (
    NUM_DIFFERENTIABLE,
    NUM_TENSORS,
    AttentionCall,
    AttentionKept,
    as_heads,
)
from mmpeft_fast.ops.flash import flash_forward
from mmpeft_fast.ops.opaque import opaque
from mmpeft_fast.ops.providers import kernel_set_of

_ALL_RAW = (True, True, True)


class OpaqueAttentionRunner(NamedTuple):
    """`AttentionRunner` behind opaque ops, on the kernels that run when these do. provider: the one that was asked for,
    if any."""

    provider: str | None
    is_taped = False

    def forward(self, call: AttentionCall, need: tuple[bool, ...], overwrite: bool) -> AttentionKept:
        results = torch.ops.mmpeft_fast.attention_forward(self.provider, *_flatten(call))
        out, lse, *extra = results
        return AttentionKept(*call[:3], _ALL_RAW, out, lse, tuple(extra), call.q.shape[1] == call.k.shape[1])

    def backward(
        self, call: AttentionCall, kept: AttentionKept, dout: Tensor, need: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        call = call._replace(q=kept.q, k=kept.k, v=kept.v)
        results = iter(
            torch.ops.mmpeft_fast.attention_backward(
                self.provider, *_flatten(call), kept.out, kept.lse, kept.extra, dout, need
            )
        )
        first = []
        if _has_joint_grads(call, need):
            first = next(results).split([x.shape[-1] for x in call[:3]], dim=-1)
        return *first, *(next(results) if wanted else None for wanted in need[len(first) :])


def _flatten(call: AttentionCall) -> tuple:
    return list(call[:NUM_TENSORS]), *call[NUM_TENSORS:-1]  # documents are a mask where a compiler looks


def _has_joint_grads(call: AttentionCall, need: tuple[bool, ...]) -> bool:
    return all(need[:3]) and call.q.shape[1] == call.k.shape[1]


def _run_forward(provider, tensors, *options) -> list[Tensor]:
    call = AttentionCall(*tensors, *options)
    _, result = attention_schedule.forward(kernel_set_of(provider, "attention", call.q), call)
    return [result.out.transpose(1, 2).flatten(-2), result.lse, *result.extra]


def _fake_forward(provider, tensors, *options) -> list[Tensor]:
    call = AttentionCall(*tensors, *options)
    q, k, v = (as_heads(x, call.head_dim) for x in call[:3])
    # The library says what its log-sum-exp is like, though not of everything on which device it will be.
    result = flash_forward(q, k, v, call.mask, call.causal, call.scale)
    others = (call.q.new_empty(x.shape, dtype=x.dtype) for x in (result.lse, *result.extra))
    return [call.q.new_empty(call.q.shape), *others]


def _run_backward(provider, tensors, head_dim, eps, scale, causal, out, lse, extra, dout, need) -> list[Tensor]:
    call = AttentionCall(*tensors, head_dim, eps, scale, causal)
    joint = _has_joint_grads(call, need)
    kept = AttentionKept(*call[:3], _ALL_RAW, out, lse, tuple(extra), joint)
    kernels = kernel_set_of(provider, "attention", call.q)
    grads = attention_schedule.backward(kernels, call, kept, dout, tuple(need))
    first = [stacking.columns(grads[:3])] if joint else []
    rest = slice(3 * joint, None)
    return [*first, *itertools.compress(grads[rest], need[rest])]


def _fake_backward(provider, tensors, head_dim, eps, scale, causal, out, lse, extra, dout, need) -> list[Tensor]:
    call = AttentionCall(*tensors, head_dim, eps, scale, causal)
    joint = _has_joint_grads(call, need)
    first = [call.q.new_empty(*call.q.shape[:-1], sum(x.shape[-1] for x in call[:3]))] if joint else []
    rest = slice(3 * joint, NUM_DIFFERENTIABLE)
    return [*first, *(x.new_empty(x.shape) for x in itertools.compress(call[rest], need[rest]))]


_CALL = "str? provider, Tensor?[] tensors, int head_dim, float eps, float scale, bool causal"
opaque("attention_forward", f"({_CALL})", _run_forward, _fake_forward)
opaque(
    "attention_backward",
    f"({_CALL}, Tensor out, Tensor lse, Tensor[] extra, Tensor dout, bool[] needs)",
    _run_backward,
    _fake_backward,
)

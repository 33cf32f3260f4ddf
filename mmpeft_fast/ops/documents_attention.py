"""Attention of packed documents and shared contexts as parts that are merged by log-sum-exp (`documents.py`).

Every part is the library's flash attention on tokens of its own:

    L = log sum_p exp(L_p),   o = sum_p exp(L_p - L) o_p

and its backward, called with the merged o and L, gives the part's exact gradients (`ops.flash`). No mask is made. On a
GPU a part is one call over all its spans, whatever their number; elsewhere one call a span.
"""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.documents import Documents, Span
from mmpeft_fast.ops.flash import FlashResult, flash_backward, flash_forward, has_flash_kernel

_aten = torch.ops.aten
_VARLEN = "documents: varlen"
_SPANS = "documents: spans"


def documents_forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> FlashResult:
    """q [B, H, T, DH]; k, v [B, HK, T, DH], HK divides H. out is laid out like q, lse [B, H, T] is contiguous; padding
    gives anything finite."""
    if q.device.type in ("cuda", "meta") and has_flash_kernel(q):
        return _varlen_forward(q, k, v, documents, scale)
    if q.device.type in ("cuda", "meta"):
        return flash_forward(q, k, v, documents.mask(q.shape[2], q.device), False, scale)
    out, lse = torch.zeros_like(q), None
    for number, spans in enumerate(documents.levels):
        for span in spans:
            queries, keys = _parts(span)
            part = flash_forward(q[queries], k[keys], v[keys], None, number == 0, scale)
            if lse is None:
                lse = part.lse.new_full(q.shape[:3], float("-inf"))
            if number == 0:
                out[queries], lse[queries] = part.out, part.lse
            else:
                _merge_into(out[queries], lse[queries], part.out, part.lse)
    if lse is None:
        lse = torch.full(q.shape[:3], float("-inf"), device=q.device)
    return FlashResult(out, lse, (), _SPANS)


def documents_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, result: FlashResult, documents: Documents, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes of q, k, v; `result` may hold the out and lse of a softmax over further keys."""
    if result.kernel == _VARLEN:
        return _varlen_backward(dout, q, k, v, result, documents, scale)
    if result.kernel != _SPANS:
        return flash_backward(dout, q, k, v, result, documents.mask(q.shape[2], q.device), False, scale)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for number, spans in enumerate(documents.levels):
        for span in spans:
            queries, keys = _parts(span)
            part = FlashResult(result.out[queries], result.lse[queries].contiguous(), ())
            grads = flash_backward(dout[queries], q[queries], k[keys], v[keys], part, None, number == 0, scale)
            dq[queries] += grads[0]
            dk[keys] += grads[1]
            dv[keys] += grads[2]
    return dq, dk, dv


def _parts(span: Span) -> tuple[tuple, tuple]:
    """Indices of a span's queries and keys in [B, heads, T, ..]."""
    row = slice(span.row, span.row + 1)
    return (row, slice(None), slice(span.start, span.stop)), (row, slice(None), slice(span.first, span.last))


def _merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """out [.., DH] and lse [..] of a softmax become those of one over a further part's keys, too."""
    total = torch.logaddexp(lse, part_lse)
    mine, other = (torch.exp(part - total)[..., None] for part in (lse, part_lse))
    out.copy_(out * mine + part_out * other)
    lse.copy_(total)


class _Part(NamedTuple):
    """Tokens of the flattened batch that a call takes, where its sequences begin, and the longest of them."""

    queries: Tensor
    keys: Tensor
    starts_q: Tensor
    starts_k: Tensor
    most_q: int
    most_k: int

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        return self[2:]


@functools.lru_cache(maxsize=64)
def _tables(documents: Documents, length: int, device: torch.device) -> tuple[tuple, tuple[_Part, ...]]:
    """(starts, longest) of all documents, padding a document for itself, and the parts below them."""
    starts = [0]
    for row, used in zip(documents.rows, documents.lengths, strict=True):
        for size in (*(size for size, _ in row), length - used):
            if size:
                starts.append(starts[-1] + size)
    longest = max((stop - start for start, stop in itertools.pairwise(starts)), default=0)

    def part(spans: tuple[Span, ...]) -> _Part:
        queries = [(span.row * length + span.start, span.row * length + span.stop) for span in spans]
        keys = [(span.row * length + span.first, span.row * length + span.last) for span in spans]
        indices = [torch.cat([torch.arange(*pair) for pair in pairs]) for pairs in (queries, keys)]
        sizes = [[stop - start for start, stop in pairs] for pairs in (queries, keys)]
        begins = [torch.tensor([0, *size]).cumsum(0).int() for size in sizes]
        return _Part(*(table.to(device) for table in (*indices, *begins)), *map(max, sizes))

    return (torch.tensor(starts).int().to(device), longest), tuple(part(spans) for spans in documents.levels[1:])


def _flat(x: Tensor) -> Tensor:
    """[B, heads, T, DH] as [B * T, heads, DH]."""
    return x.transpose(1, 2).flatten(0, 1)


def _varlen_forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> FlashResult:
    batch, heads, length, _ = q.shape
    (starts, longest), parts = _tables(documents, length, q.device)
    flat = [_flat(x) for x in (q, k, v)]
    out, lse, *extra, _ = _aten._flash_attention_forward(
        *flat, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )
    for part in parts:
        chosen = flat[0][part.queries], flat[1][part.keys], flat[2][part.keys]
        part_out, part_lse, *state, _ = _aten._flash_attention_forward(
            *chosen, *part.lengths, 0.0, False, False, scale=scale
        )
        merged, total = out[part.queries].transpose(0, 1), lse[:, part.queries]
        _merge_into(merged, total, part_out.transpose(0, 1), part_lse)
        out.index_copy_(0, part.queries, merged.transpose(0, 1))
        lse.index_copy_(1, part.queries, total)
        extra += state
    lse = lse.view(heads, batch, length).transpose(0, 1).contiguous()
    return FlashResult(out.unflatten(0, (batch, length)).transpose(1, 2), lse, tuple(extra), _VARLEN)


def _varlen_backward(dout, q, k, v, result: FlashResult, documents: Documents, scale: float):
    batch, heads, length, _ = q.shape
    (starts, longest), parts = _tables(documents, length, q.device)
    dout, *flat, out = (_flat(x) for x in (dout, q, k, v, result.out))
    lse = result.lse.transpose(0, 1).reshape(heads, batch * length)
    states = [result.extra[number : number + 2] for number in range(0, len(result.extra), 2)]
    grads = _aten._flash_attention_backward(
        dout, *flat, out, lse, starts, starts, longest, longest, 0.0, True, *states[0], scale=scale
    )
    for part, state in zip(parts, states[1:], strict=True):
        chosen = [flat[0][part.queries], flat[1][part.keys], flat[2][part.keys], out[part.queries]]
        further = _aten._flash_attention_backward(
            dout[part.queries], *chosen, lse[:, part.queries], *part.lengths, 0.0, False, *state, scale=scale
        )
        for grad, more, index in zip(grads, further, (part.queries, part.keys, part.keys), strict=True):
            grad.index_add_(0, index, more)
    return tuple(grad.unflatten(0, (batch, length)).transpose(1, 2) for grad in grads)

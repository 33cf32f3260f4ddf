"""Head and cross-entropy in one op, for the rows that carry a label.

    loss = sum_i (logsumexp(W x_i + b) - (W x_i + b)[label_i]) / n

Rows are processed in chunks and the gradient is formed in the same pass (as in Liger's fused linear cross-entropy), so
neither logits nor a recomputed GEMM are ever needed again: only dx [S, H] is kept, and dW where the head is trained.
"""

import functools
import itertools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.autocast import autocast_dtype, without_autocast
from mmpeft_fast.ops.opaque import opaque, traceable
from mmpeft_fast.ops.providers import forced_provider, kernel_set, kernel_set_of

# Logits of a chunk in the accumulation dtype stay near 128 MiB: enough rows for an efficient GEMM at 150k words.
_CHUNK_LOGITS = 1 << 25


class _LinearCrossEntropy(torch.autograd.Function):
    """run: `_loss_and_grads` on the kernels of the moment where it is None."""

    @staticmethod
    def forward(ctx, run, x, weight, bias, labels, count):
        run = run or functools.partial(_loss_and_grads, kernel_set("linear_cross_entropy", x))
        need = ctx.needs_input_grad[1:4]
        loss, *grads = run(x, weight, bias, labels, count, need)
        grads = iter(grads)
        ctx.save_for_backward(*(next(grads) if wanted else None for wanted in need))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        grads = (None if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors)
        return None, *grads, None, None


def _loss_and_grads(kernels, x, weight, bias, labels, count, need) -> list[Tensor]:
    """The loss, then the wanted ones of dx, dweight, dbias."""
    need_dx, need_dweight, need_dbias = need
    wide = accumulate_dtype(x.dtype)
    loss = torch.zeros((), dtype=wide, device=x.device)
    dx = torch.empty_like(x) if need_dx else None
    dweight = torch.zeros_like(weight, dtype=wide) if need_dweight else None
    dbias = torch.zeros_like(bias, dtype=wide) if need_dbias else None
    chunk = max(1, _CHUNK_LOGITS // weight.shape[0])
    for start in range(0, x.shape[0], chunk):
        rows = x[start : start + chunk]
        logits = torch.nn.functional.linear(rows, weight, bias)
        loss += kernels.cross_entropy_(logits, labels[start : start + chunk], count, need_grad=any(need))
        if need_dx:
            torch.mm(logits, weight, out=dx[start : start + chunk])
        if need_dweight:
            dweight += logits.t() @ rows
        if need_dbias:
            dbias += logits.sum(0, dtype=wide)
    if not x.shape[0]:
        loss = loss / count
    grads = zip((dx, dweight, dbias), (x, weight, bias), need, strict=True)
    return [loss, *(grad.to(like.dtype) for grad, like, wanted in grads if wanted)]


def _run(provider, x, *arguments) -> list[Tensor]:
    return _loss_and_grads(kernel_set_of(provider, "linear_cross_entropy", x), x, *arguments)


def _fake(provider, x, weight, bias, labels, count, need) -> list[Tensor]:
    loss = x.new_empty((), dtype=accumulate_dtype(x.dtype))
    return [loss, *(tensor.new_empty(tensor.shape) for tensor in itertools.compress((x, weight, bias), need))]


_CALL = "str? provider, Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor count"
opaque("linear_cross_entropy_forward", f"({_CALL}, bool[] needs)", _run, _fake)
traceable(
    "linear_cross_entropy",
    f"({_CALL}) -> Tensor",
    lambda provider, *arguments: _LinearCrossEntropy.apply(
        functools.partial(torch.ops.mmpeft_fast.linear_cross_entropy_forward, provider), *arguments
    ),
)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, count: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of `x weight^T + bias` against labels, in float32 (float64 for float64 inputs).

    Args:
        x: [S, H]. Under autocast x, weight and bias are cast to its dtype.
        weight: [V, H] in x's dtype, the head; frozen or trained. bias: [V] or None.
        labels: [S] int64; rows with -100 are ignored.
        count: what the summed loss is divided by; the number of rows that are not ignored when None.

    Returns:
        0-dim loss. With no labelled row and no `count` it is nan, as torch's mean over nothing; the gradients are then
        zero, as torch's are.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if weight.dim() != 2 or x.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: expected x [S, H], weight [V, H], labels [S], got x {list(x.shape)}, "
            f"weight {list(weight.shape)}, labels {list(labels.shape)}"
        )
    if not weight.shape[0] or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"linear_cross_entropy: expected a head of at least one word and a bias of as many, got weight "
            f"{list(weight.shape)}, bias {None if bias is None else list(bias.shape)}"
        )
    if labels.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: expected labels in torch.int64, got {labels.dtype}")
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != x.dtype:
        raise ValueError(f"linear_cross_entropy: expected weight of x's dtype {x.dtype}, got {weight.dtype}")
    if count is None:
        count = (labels != IGNORE_INDEX).sum()
    count = torch.as_tensor(count, device=x.device)
    if count.dim():
        raise ValueError(f"linear_cross_entropy: expected one count, got a tensor of sizes {list(count.shape)}")
    with without_autocast(x):
        if torch.compiler.is_compiling():
            return torch.ops.mmpeft_fast.linear_cross_entropy(forced_provider(), x, weight, bias, labels, count)
        return _LinearCrossEntropy.apply(None, x, weight, bias, labels, count)


def linear_cross_entropy_ref(x, weight, labels, *, bias=None, count=None) -> Tensor:
    """The definition in plain differentiable torch."""
    logits = torch.nn.functional.linear(x, weight, bias).to(accumulate_dtype(x.dtype))
    total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / ((labels != IGNORE_INDEX).sum() if count is None else count)

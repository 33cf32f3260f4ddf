"""Head and cross-entropy in one op, for the rows that carry a label.

    loss = sum_i (logsumexp(W x_i + b) - (W x_i + b)[label_i]) / n

Rows are processed in chunks and the gradient is formed in the same pass (as in Liger's fused linear cross-entropy), so
neither logits nor a recomputed GEMM are ever needed again: only dx [S, H] is kept, and dW where the head is trained.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.kernels_torch import IGNORE_INDEX
from mmpeft_fast.ops.providers import kernel_set

# Logits of a chunk in the accumulation dtype stay near 128 MiB: enough rows for an efficient GEMM at 150k words.
_CHUNK_LOGITS = 1 << 25


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, labels, count):
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        wide = accumulate_dtype(x.dtype)
        kernels = kernel_set("linear_cross_entropy", x)
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if need_dx else None
        dweight = torch.zeros_like(weight, dtype=wide) if need_dweight else None
        dbias = torch.zeros_like(bias, dtype=wide) if need_dbias else None
        chunk = max(1, _CHUNK_LOGITS // weight.shape[0])
        for start in range(0, x.shape[0], chunk):
            rows = x[start : start + chunk]
            logits = torch.nn.functional.linear(rows, weight, bias)
            need_grad = need_dx or need_dweight or need_dbias
            loss += kernels.cross_entropy_(logits, labels[start : start + chunk], count, need_grad=need_grad)
            if need_dx:
                torch.mm(logits, weight, out=dx[start : start + chunk])
            if need_dweight:
                dweight += logits.t() @ rows
            if need_dbias:
                dbias += logits.sum(0, dtype=wide)
        if not x.shape[0]:
            loss = loss / count
        ctx.save_for_backward(
            dx,
            dweight if dweight is None else dweight.to(weight.dtype),
            dbias if dbias is None else dbias.to(bias.dtype),
        )
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return *(None if grad is None else grad * dloss.to(grad.dtype) for grad in ctx.saved_tensors), None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, count: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of `x weight^T + bias` against labels, in float32 (float64 for float64 inputs).

    Args:
        x: [S, H].
        weight: [V, H] in x's dtype, the head; frozen or trained. bias: [V] or None.
        labels: [S] int64; rows with -100 are ignored.
        count: what the summed loss is divided by; the number of rows that are not ignored when None.

    Returns:
        0-dim loss. With no labelled row and no `count` it is nan, as torch's mean over nothing.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if weight.dim() != 2 or x.dim() != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: expected x [S, H], weight [V, H], labels [S], got x {list(x.shape)}, "
            f"weight {list(weight.shape)}, labels {list(labels.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"linear_cross_entropy: expected weight of x's dtype {x.dtype}, got {weight.dtype}")
    if count is None:
        count = (labels != IGNORE_INDEX).sum()
    count = torch.as_tensor(count, device=x.device)
    return _LinearCrossEntropy.apply(x, weight, bias, labels, count)


def linear_cross_entropy_ref(x, weight, labels, *, bias=None, count=None) -> Tensor:
    """The definition in plain differentiable torch."""
    logits = torch.nn.functional.linear(x, weight, bias).to(accumulate_dtype(x.dtype))
    total = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / ((labels != IGNORE_INDEX).sum() if count is None else count)

"""Cross-entropy of gathered rows, with the logits turned into their own gradient in place.

    loss = sum_i (logsumexp(logits_i) - logits_i[label_i]) / count,  dlogits_i = (softmax(logits_i) - onehot) / count

One program a row: one pass for the log-sum-exp, one for the gradient where it is wanted. No host synchronisation.
"""

import triton
import triton.language as tl

from mmpeft_kernels.launch import launch
from mmpeft_kernels.reduction import sum_partials
from mmpeft_kernels.tile import Tile

IGNORE_INDEX = -100
# A row at a time; block_n words of a step.
DEFAULT_TILE = Tile(block_m=1, block_n=4096, num_warps=8)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, count_ptr, loss_ptr, V, stride_logitsm,
    IGNORE: tl.constexpr, NEED_GRAD: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_logitsm
    label = tl.load(labels_ptr + row)
    is_kept = label != IGNORE
    count = tl.load(count_ptr).to(tl.float32)
    weight = tl.where(is_kept, 1.0 / count, 0.0)  # a count of 0, with every row ignored, is no nan

    # Phase 1: a running maximum and sum for each lane, merged at the end.
    highest = tl.full([BLOCK_V], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_V], tl.float32)
    for v in range(0, V, BLOCK_V):
        offs_v = v + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, logits)
        # A lane that has seen nothing but -inf must not compute -inf - -inf.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.exp(logits - shift)
        highest = higher
    top = tl.max(highest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(highest - top), axis=0))
    target = tl.load(logits_ptr + tl.where(is_kept, label, 0)).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(is_kept, lse - target, 0.0) / count)

    # Phase 2: the gradient takes the logits' place.
    if NEED_GRAD:
        # Every thread has to have read the target before one of them overwrites it.
        tl.debug_barrier()
        for v in range(0, V, BLOCK_V):
            offs_v = v + tl.arange(0, BLOCK_V)
            logits = tl.load(logits_ptr + offs_v, mask=offs_v < V, other=float("-inf")).to(tl.float32)
            dlogits = (tl.exp(logits - lse) - tl.where(offs_v == label, 1.0, 0.0)) * weight
            tl.store(logits_ptr + offs_v, dlogits.to(logits_ptr.dtype.element_ty), mask=offs_v < V)


def cross_entropy_(logits, labels, count, *, need_grad=True, tile: Tile = DEFAULT_TILE):
    """The 0-dim float32 loss; with `need_grad` the logits [S, V] are overwritten by their gradient.

    logits: unit column stride; labels [S] int64, rows with -100 are ignored; count: 0-dim tensor on the same device,
    what the sum is divided by.
    """
    import torch

    num_rows, num_words = logits.shape
    loss = logits.new_empty(num_rows, 1, dtype=torch.float32)
    if num_rows:
        launch(
            _cross_entropy_kernel, (num_rows,), logits.device, logits, labels, count, loss, num_words, logits.stride(0),
            IGNORE=IGNORE_INDEX, NEED_GRAD=need_grad, BLOCK_V=tile.block_n,
            **tile.options,
        )  # fmt: skip
    return sum_partials(loss, torch.float32)[0]

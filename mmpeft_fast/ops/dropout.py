"""Counter-based dropout: the mask is a function of (seed, stream, row, column), regenerated wherever it is needed.

Philox4x32-7 (Salmon et al., SC'11, "Parallel random numbers: as easy as 1, 2, 3", table 2: the fewest rounds that pass
BigCrush). One call gives eight 16-bit lanes, so element (m, k) of an [M, K] tensor is lane k % 8 of counter
(k // 8, m, stream, 0) under key `seed`.
An element is dropped where its lane, read as a signed 16-bit integer, is below `round(p * 2**16) - 2**15`.
The same seed gives the same bits in every provider, whatever the device, thread count or tile size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmpeft_fast.ops import dropout_gpu
from mmpeft_fast.ops.library import LIBRARY

ROUNDS = 7
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW_32 = 0xFFFFFFFF
_LANES = 8
# Counters a chunk: bounds scratch memory (five 64-bit words a counter); smaller chunks only add launches.
_CHUNK_COUNTERS = 1 << 17


def draw_seed(device: torch.device) -> Tensor:
    """A fresh 0-dim int64 seed from torch's generator of `device`: reproducible by `torch.manual_seed`, no host sync,
    and replayed by activation checkpointing, which restores that generator."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def keep_probability(p: float) -> float:
    """The exact probability with which an element is kept: `p` rounded to 16 bits."""
    return 1.0 - round(p * 65536) / 65536


def philox_4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: Tensor, rounds: int = ROUNDS
) -> tuple[Tensor, ...]:
    """Philox4x32 on int64 tensors that hold 32-bit counters.

    Returns four int64 tensors whose low 32 bits are the result; the upper 32 bits of two of them are not meaningful.
    The four arguments are used as scratch memory.
    """
    k0, k1 = seed & _LOW_32, (seed >> 32) & _LOW_32
    product_0, product_1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(rounds):
        torch.mul(c0, _MULTIPLIER_0, out=product_0)
        torch.mul(c2, _MULTIPLIER_1, out=product_1)
        # Only words that are multiplied next need their upper halves cleared; the sign extension goes with them.
        torch.bitwise_right_shift(product_1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW_32)
        torch.bitwise_right_shift(product_0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW_32)
        c1, product_1 = product_1, c1
        c3, product_0 = product_0, c3
        k0, k1 = (k0 + _WEYL_0) & _LOW_32, (k1 + _WEYL_1) & _LOW_32
    return c0, c1, c2, c3


_MASK_DTYPES = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _keep_bits(seed: Tensor, num_rows: int, num_cols: int, p: float, stream: int, itemsize: int) -> Tensor:
    threshold = round(p * 65536) - 32768
    num_blocks = -(-num_cols // _LANES)
    col = torch.arange(num_blocks, device=seed.device)
    keep = torch.empty(num_rows, num_blocks * _LANES, dtype=_MASK_DTYPES[itemsize], device=seed.device)
    rows_per_chunk = max(1, _CHUNK_COUNTERS // max(1, num_blocks))
    for start in range(0, num_rows, rows_per_chunk):
        row = torch.arange(start, min(start + rows_per_chunk, num_rows), device=seed.device)
        counters = torch.zeros(4, len(row), num_blocks, dtype=torch.int64, device=seed.device)
        counters[0] = col
        counters[1] = row[:, None]
        counters[2] = stream
        words = torch.empty(len(row), num_blocks, 4, dtype=torch.int32, device=seed.device)
        for i, word in enumerate(philox_4x32(*counters.unbind(), seed)):
            words[..., i].copy_(word)
        # 0 where a lane is below the threshold, -1 (all bits) elsewhere; comparisons to bool are several times slower.
        lanes = words.view(torch.int16).flatten(1).clamp_(threshold - 1, threshold)
        torch.sub(threshold - 1, lanes, out=lanes)
        keep[start : start + len(row)] = lanes
    return keep if keep.shape[1] == num_cols else keep[:, :num_cols].contiguous()


# One op to the dispatcher: a provider replaces it by device, and fake tensors need not trace its arithmetic.
LIBRARY.define("keep_bits(Tensor seed, SymInt num_rows, SymInt num_cols, float p, int stream, int itemsize) -> Tensor")
LIBRARY.impl("keep_bits", _keep_bits, "CompositeExplicitAutograd")


@torch.library.register_fake("mmpeft_fast::keep_bits", lib=LIBRARY)
def _(seed, num_rows, num_cols, p, stream, itemsize):
    return seed.new_empty((num_rows, num_cols), dtype=_MASK_DTYPES[itemsize])


def keep_bits(seed: Tensor, num_rows: int, num_cols: int, p: float, *, stream: int = 0, itemsize: int = 2) -> Tensor:
    """Dropout as a bit mask: all bits set where an element is kept, none where it is dropped.

    Args:
        seed: 0-dim int64 tensor, on the device of the result.
        p: dropout probability, 2**-17 < p < 1.
        stream: separates masks that share a seed.
        itemsize: bytes of an element of the tensor to be masked: 2, 4 or 8.

    Returns:
        [num_rows, num_cols] int16, int32 or int64.
    """
    return torch.ops.mmpeft_fast.keep_bits(seed, num_rows, num_cols, p, stream, itemsize)


def _zero_dropped(xs: Sequence[Tensor], seed: Tensor, p: float, stream: int) -> list[Tensor]:
    keep = keep_bits(seed, *xs[0].shape, p, stream=stream, itemsize=xs[0].element_size())
    return [(x.view(keep.dtype) & keep).view(x.dtype) for x in xs]


LIBRARY.define("zero_dropped(Tensor[] xs, Tensor seed, float p, int stream) -> Tensor[]")
LIBRARY.impl("zero_dropped", _zero_dropped, "CompositeExplicitAutograd")
LIBRARY.impl("zero_dropped", dropout_gpu.zero_dropped, "CUDA")


@torch.library.register_fake("mmpeft_fast::zero_dropped", lib=LIBRARY)
def _(xs, seed, p, stream):
    return [x.new_empty(x.shape) for x in xs]


def zero_dropped(xs: Sequence[Tensor], seed: Tensor, p: float, *, stream: int = 0) -> list[Tensor]:
    """Tensors of one mask with their dropped elements zero; the mask is drawn once, or where it is applied.

    Args:
        xs: [M, K] each, of one shape, device and dtype, with unit column stride.
        seed, p, stream: as in `keep_bits`.
    """
    return torch.ops.mmpeft_fast.zero_dropped(list(xs), seed, p, stream)


def dropped(seed: Tensor, num_rows: int, num_cols: int, p: float, *, stream: int = 0) -> Tensor:
    """Which elements of a [num_rows, num_cols] tensor are dropped: bool, True with probability `p`."""
    if round(p * 65536) == 0:
        return torch.zeros(num_rows, num_cols, dtype=torch.bool, device=seed.device)
    return keep_bits(seed, num_rows, num_cols, p, stream=stream) == 0


def dropout_ref(x: Tensor, seed: Tensor | None, p: float, *, stream: int = 0) -> Tensor:
    """`x` [..., K] with elements dropped and the rest divided by the probability of being kept; differentiable.
    Without a seed it is torch's own dropout, what stock stacks run."""
    if p == 0.0:
        return x
    if seed is None:
        return torch.nn.functional.dropout(x, p)
    rows = x.reshape(-1, x.shape[-1])
    mask = dropped(seed, rows.shape[0], rows.shape[1], p, stream=stream).view(x.shape)
    return x.masked_fill(mask, 0.0) / keep_probability(p)

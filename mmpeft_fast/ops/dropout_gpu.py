"""The torch provider's dropout on a GPU: one elementwise kernel of torch's runtime compiler (`torch.cuda.jiterator`).

The masks of `ops.dropout` by tensor arithmetic are some eighty launches on 64-bit words. Here they are drawn in the
kernel that applies them, which reads and writes the operand once; it needs neither Triton nor nvcc.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_WORD_BYTES = 8
# A word holds 64 / lanes bits of each of `lanes` neighbours in a row, which one counter serves: lanes divides 8.
CODE = """
template <typename T>
T zero_dropped(T word, T row, T column, T seed, T stream, T threshold, T lanes) {
  const unsigned int first = (unsigned int)(column * lanes);
  unsigned int c0 = first / 8, c1 = (unsigned int)row, c2 = (unsigned int)stream, c3 = 0;
  unsigned int k0 = (unsigned int)seed, k1 = (unsigned int)((unsigned long long)seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const unsigned long long product_0 = (unsigned long long)c0 * 0xD2511F53u;
    const unsigned long long product_1 = (unsigned long long)c2 * 0xCD9E8D57u;
    c0 = (unsigned int)(product_1 >> 32) ^ c1 ^ k0;
    c1 = (unsigned int)product_1;
    c2 = (unsigned int)(product_0 >> 32) ^ c3 ^ k1;
    c3 = (unsigned int)product_0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const unsigned long long low = c0 | ((unsigned long long)c1 << 32), high = c2 | ((unsigned long long)c3 << 32);
  const unsigned long long drawn = (first & 4 ? high : low) >> (16 * (first & 3));
  const int bits = (int)(64 / lanes);
  unsigned long long keep = 0;
  for (int i = 0; i < (int)lanes; ++i) {
    const short lane = (short)(drawn >> (16 * i));
    if (lane >= (int)threshold) keep |= (~0ull >> (64 - bits)) << (i * bits);
  }
  return (T)((unsigned long long)word & keep);
}
"""


@functools.cache
def _kernel() -> Callable[..., Tensor]:
    return torch.cuda.jiterator._create_jit_fn(CODE, stream=0, threshold=0, lanes=1)


def zero_dropped(
    xs: Sequence[Tensor], seed: Tensor, p: float, stream: int, *, kernel: Callable[..., Tensor] | None = None
) -> list[Tensor]:
    """`ops.dropout.zero_dropped` by the kernel: a launch a tensor, and one that counts rows and columns."""
    kernel = kernel or _kernel()
    num_rows, num_cols = xs[0].shape
    lanes = _WORD_BYTES // xs[0].element_size()
    num_words = -(-num_cols // lanes)
    index = torch.arange(max(num_rows, num_words), device=seed.device)
    results = []
    for x in xs:
        if num_cols % lanes:
            x = torch.nn.functional.pad(x, (0, num_words * lanes - num_cols))
        words = kernel(
            x.contiguous().view(torch.int64), index[:num_rows, None], index[:num_words], seed,
            stream=stream, threshold=round(p * 65536) - 32768, lanes=lanes,
        )  # fmt: skip
        results.append(words.view(x.dtype)[:, :num_cols])
    return results

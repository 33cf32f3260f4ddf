"""The same Philox bits as the torch provider."""

import pytest
import torch
from mmpeft_kernels.dropout import dropped, inverse_keep_of
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops import dropout


@pytest.mark.parametrize(
    "rows, cols, p, stream, tile",
    [
        (1, 7, 0.05, 0, Tile(block_m=4, block_n=16)),
        (33, 130, 0.5, 1 << 16, Tile(block_m=64, block_n=128)),
        (20, 33, 0.9, 3, Tile(block_m=16, block_n=32)),
        (0, 5, 0.1, 0, Tile(block_m=4, block_n=16)),
    ],
)
def test_bits(rows, cols, p, stream, tile):
    seed = torch.tensor(0x5A5A_1234_DEAD_BEEF)
    expected = dropout.dropped(seed, rows, cols, p, stream=stream)
    assert torch.equal(dropped(seed, rows, cols, p, stream=stream, tile=tile), expected)
    assert inverse_keep_of(p) == 1.0 / dropout.keep_probability(p)


def test_seed_and_stream_matter():
    seed = torch.tensor(2**62 + 1)
    base = dropped(seed, 8, 64, 0.5)
    assert not torch.equal(base, dropped(seed - 2**62, 8, 64, 0.5))
    assert not torch.equal(base, dropped(seed, 8, 64, 0.5, stream=1))

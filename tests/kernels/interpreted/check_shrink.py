"""The shrink of branches: a = drop(h) D^T / keep, split over its depth, and z = s f(a)."""

import pytest
import torch
from mmpeft_kernels import shrink as shrink_kernel
from mmpeft_kernels.shrink import num_splits, shrink
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.activations import ACTIVATIONS
from mmpeft_fast.ops.dropout import dropout_ref
from tests.closeness import assert_as_close_as_eager

SEED = torch.tensor(0x0123_4567_89AB_CDEF)
TILE = Tile(block_m=16, block_n=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows, depth, rank", [(1, 33, 1), (33, 130, 20), (17, 1000, 300)])
@pytest.mark.parametrize("splits", [1, 3, 7])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_shrink(monkeypatch, dtype, num_rows, depth, rank, splits, p):
    monkeypatch.setattr(shrink_kernel, "num_splits", lambda *sizes: splits)
    torch.manual_seed(0)
    h = torch.randn(num_rows, depth + 3).to(dtype)[:, :depth]
    down = torch.randn(rank, depth + 5)[:, :depth] / depth**0.5  # wider than h, as trained parameters are
    got, z = shrink(h, down, activation="tanh", z_scaling=1.7, p=p, seed=SEED, stream=2, tile=TILE)
    rounded = down.to(dtype)
    eager = dropout_ref(h, SEED, p, stream=2) @ rounded.t()
    true = dropout_ref(h.double(), SEED, p, stream=2) @ rounded.double().t()
    assert got.dtype == z.dtype == dtype
    assert_as_close_as_eager(got, eager, true, "a")
    function = ACTIVATIONS["tanh"].function
    assert_as_close_as_eager(z / 1.7, function(eager), function(true), "z")
    assert torch.equal(got, shrink(h, down, p=p, seed=SEED, stream=2, tile=TILE)[0])


def test_splits_fill_the_gpu_and_leave_work_to_each():
    assert num_splits(22, 4096, 64, 132) == 6
    assert num_splits(1000, 4096, 64, 132) == 1
    assert num_splits(1, 256, 64, 132) == 1 and num_splits(1, 8192, 64, 132) == 32


def test_no_rows_and_z_that_is_a():
    a, z = shrink(torch.empty(0, 16), torch.ones(2, 16))
    assert a.shape == (0, 2) and z is a
    a, z = shrink(torch.ones(3, 16), torch.ones(2, 16), tile=TILE)
    assert z is a and torch.equal(a, torch.full((3, 2), 16.0))

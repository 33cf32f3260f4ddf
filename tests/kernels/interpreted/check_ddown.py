"""dD from recomputed or given h."""

import pytest
import torch
from mmpeft_kernels.ddown import ddown
from mmpeft_kernels.prologue import PROLOGUES
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.dropout import dropout_ref
from mmpeft_fast.ops.prologue import prologue_ref
from tests.closeness import assert_as_close_as_eager

SEED = torch.tensor(0x0123_4567_89AB_CDEF)
TILE = Tile(block_m=16, block_n=64)


def reference(da, x, name, gain, in_scale, p):
    return da.t() @ dropout_ref(prologue_ref(name, x, gain, 1e-6, in_scale), SEED, p, stream=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("num_rows, width, rank", [(1, 33, 3), (40, 130, 20)])
@pytest.mark.parametrize("with_scale, p", [(False, 0.0), (True, 0.3)])
def test_ddown(dtype, name, num_rows, width, rank, with_scale, p):
    torch.manual_seed(0)
    x = tuple(torch.randn(num_rows, width).to(dtype) for _ in range(2 if name == "swiglu" else 1))
    gain = torch.randn(width).to(dtype) if name == "rms_norm" else None
    in_scale = torch.randn(width).to(dtype) if with_scale else None
    da = torch.randn(num_rows, rank).to(dtype)
    got = ddown(
        da, x[0], x[1] if name == "swiglu" else None, out_dtype=dtype, name=name, gain=gain, in_scale=in_scale,
        rstd=(x[0].float().pow(2).mean(-1) + 1e-6).rsqrt(), p=p, seed=SEED, stream=2, tile=TILE,
    )  # fmt: skip
    wide = (None if part is None else part.double() for part in (gain, in_scale))
    truth = reference(da.double(), tuple(part.double() for part in x), name, *wide, p)
    assert got.dtype == dtype
    assert_as_close_as_eager(got, reference(da, x, name, gain, in_scale, p), truth)


def test_many_ranks_and_no_rows():
    da, h = torch.randn(5, 150), torch.randn(5, 20)
    got = ddown(da, h, out_dtype=torch.float32, tile=TILE)
    assert_as_close_as_eager(got, da.t() @ h, da.double().t() @ h.double())
    assert torch.equal(got, ddown(da, h, out_dtype=torch.float32, tile=TILE))
    assert torch.equal(ddown(da[:0], h[:0], out_dtype=torch.float32), torch.zeros(150, 20))

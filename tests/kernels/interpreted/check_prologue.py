"""Prologue and shrink: h, rstd, a and z."""

import pytest
import torch
from mmpeft_kernels.prologue import MAX_WHOLE_ROW, PROLOGUES, prologue
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.activations import ACTIVATIONS
from mmpeft_fast.ops.dropout import dropout_ref
from mmpeft_fast.ops.prologue import prologue_ref
from tests.closeness import assert_as_close_as_eager

SEED = torch.tensor(0x0123_4567_89AB_CDEF)


def reference(name, x, gain, in_scale, down, activation, p):
    h = prologue_ref(name, x, gain, 1e-6, in_scale)
    a = dropout_ref(h, SEED, p, stream=2) @ down.to(h.dtype).t()
    return h, a, ACTIVATIONS[activation].function(a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("num_rows, width, rank", [(1, 33, 3), (33, 130, 20)])
@pytest.mark.parametrize("in_scale, activation, p", [(False, "identity", 0.0), (True, "tanh", 0.3)])
def test_prologue(dtype, name, num_rows, width, rank, in_scale, activation, p):
    torch.manual_seed(0)
    wide = torch.randn(2 if name == "swiglu" else 1, num_rows, width + 3)
    x = tuple(part.to(dtype)[:, :width] for part in wide)  # rows do not follow one another
    gain = torch.randn(width, dtype=dtype) if name == "rms_norm" else None
    scale = torch.randn(width) if in_scale else None  # wider than x, as trained parameters are
    down = torch.randn(rank, width) / width**0.5
    up = x[1] if name == "swiglu" else None
    tile = Tile(block_m=16, block_n=64)
    h, rstd, a, z = prologue(
        x[0], up, name=name, gain=gain, in_scale=scale, down=down,
        activation=activation, p=p, seed=SEED, stream=2, tile=tile,
    )  # fmt: skip
    rounded = down.to(dtype)
    eager = reference(name, x, gain, scale, rounded, activation, p)
    truth = reference(
        name,
        tuple(part.double() for part in x),
        None if gain is None else gain.double(),
        None if scale is None else scale.double(),
        rounded.double(),
        activation,
        p,
    )
    for got, plain, true, what in zip((h, a, z), eager, truth, "haz"):
        assert got.dtype == dtype
        assert_as_close_as_eager(got, plain, true, what)
    if name == "rms_norm":
        narrow, true = ((part.pow(2).mean(-1) + 1e-6).rsqrt() for part in (x[0].float(), x[0].double()))
        assert_as_close_as_eager(rstd, narrow, true, "rstd")


def test_rows_wider_than_a_program_holds():
    torch.manual_seed(0)
    x, gain = torch.randn(3, MAX_WHOLE_ROW + 8).half(), torch.randn(MAX_WHOLE_ROW + 8)
    h, rstd, _, _ = prologue(x, name="rms_norm", gain=gain)
    eager, true = (prologue_ref("rms_norm", (part,), gain.to(part.dtype), 1e-6, None) for part in (x, x.double()))
    assert_as_close_as_eager(h, eager, true)
    assert_as_close_as_eager(rstd, *((part.pow(2).mean(-1) + 1e-6).rsqrt() for part in (x.float(), x.double())))


def test_what_is_not_asked_for_is_not_computed():
    x = torch.randn(5, 16)
    assert prologue(x)[0] is x and prologue(x)[1:] == (None, None, None)
    h, rstd, a, z = prologue(x, name="rms_norm", gain=torch.ones(16), down=torch.randn(2, 16), write_h=False)
    assert h is None and rstd.shape == (5,) and a is z
    h, _, a, _ = prologue(x, in_scale=torch.full((16,), 2.0))
    assert torch.equal(h, 2 * x) and a is None


def test_many_ranks_take_several_blocks():
    x, down = torch.randn(4, 32), torch.randn(300, 32)
    h, _, a, _ = prologue(x, in_scale=torch.ones(32), down=down, tile=Tile(block_m=16, block_n=32))
    assert torch.equal(h, x)
    assert_as_close_as_eager(a, x @ down.t(), x.double() @ down.double().t())


def test_no_rows():
    h, rstd, a, _ = prologue(torch.empty(0, 16), name="rms_norm", gain=torch.ones(16), down=torch.ones(2, 16))
    assert h.shape == (0, 16) and rstd.shape == (0,) and a.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name, num_rows", [("none", 1), ("rms_norm", 33), ("swiglu", 7)])
def test_columns_of_one_buffer(dtype, name, num_rows):
    """[h | z] with a scaled z, as a GEMM by layout wants it; a elsewhere, in a strided buffer too."""
    torch.manual_seed(0)
    width, rank = 33, 5
    stacked = torch.randn(num_rows, 2 * width).to(dtype)
    x = stacked.split(width, dim=1)[: 2 if name == "swiglu" else 1]
    gain = torch.randn(width).to(dtype) if name == "rms_norm" else None
    down = (torch.randn(rank, width) / width**0.5).to(dtype)
    buffer, a_buffer = torch.zeros(num_rows, width + rank + 2).to(dtype), torch.zeros(num_rows, rank + 3).to(dtype)
    outputs = {"h_out": buffer[:, :width], "z_out": buffer[:, width : width + rank], "a_out": a_buffer[:, 3:]}
    h, _, a, z = prologue(
        *x, name=name, gain=gain, down=down, activation="tanh", z_scaling=1.7, p=0.3, seed=SEED, stream=2,
        tile=Tile(block_m=16, block_n=64), **outputs,
    )  # fmt: skip
    assert h is outputs["h_out"] and a is outputs["a_out"] and z is outputs["z_out"]
    eager = reference(name, x, gain, None, down, "tanh", 0.3)
    wide_gain = None if gain is None else gain.double()
    truth = reference(name, tuple(part.double() for part in x), wide_gain, None, down.double(), "tanh", 0.3)
    for got, plain, true, what in zip((h, a, z / 1.7), eager, truth, "haz"):
        assert_as_close_as_eager(got, plain, true, what)
    assert not buffer[:, width + rank :].any() and not a_buffer[:, :3].any()
    _, _, a, z = prologue(*x, name=name, gain=gain, down=down, z_scaling=2.0, tile=Tile(block_m=16, block_n=64))
    assert torch.equal(z, 2 * a)

"""Gradients of a prologue's inputs, against autograd through its definition."""

import pytest
import torch
from mmpeft_kernels.prologue import MAX_WHOLE_ROW, PROLOGUES
from mmpeft_kernels.prologue_backward import prologue_backward
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.dropout import dropout_ref
from mmpeft_fast.ops.prologue import prologue_ref
from tests.closeness import assert_as_close_as_eager

SEED = torch.tensor(0x0123_4567_89AB_CDEF)
EPS = 1e-6


def gradients(name, x, gain, in_scale, down, dh, da, dresidual, p):
    """Of sum(dh h) + sum(da a) + sum(dresidual x), which is what reaches the prologue's inputs."""
    leaves = {f"x{i}": part for i, part in enumerate(x)} | {"gain": gain, "in_scale": in_scale}
    leaves = {key: leaf.detach().requires_grad_() for key, leaf in leaves.items() if leaf is not None}
    x = tuple(leaves[f"x{i}"] for i in range(len(x)))
    h = prologue_ref(name, x, leaves.get("gain"), EPS, leaves.get("in_scale"))
    outputs, upstream = [h], [dh]
    if da is not None:
        outputs.append(dropout_ref(h, SEED, p, stream=2) @ down.t())
        upstream.append(da)
    if dresidual is not None:
        outputs.append(x[0] * 1)
        upstream.append(dresidual)
    return dict(zip(leaves, torch.autograd.grad(outputs, tuple(leaves.values()), upstream)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("num_rows, width, rank", [(1, 33, 3), (33, 130, 70)])
@pytest.mark.parametrize("everything, p", [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_gradients(dtype, name, num_rows, width, rank, everything, p):
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape).to(dtype)

    x = tuple(random(num_rows, width) for _ in range(2 if name == "swiglu" else 1))
    gain = random(width) if name == "rms_norm" else None
    in_scale = random(width) if everything else None
    down = random(rank, width) / width**0.5
    da = random(num_rows, rank) if everything else None
    dresidual = random(num_rows, width) if everything else None
    dh = random(num_rows, width)
    tensors = (gain, in_scale, down, dh, da, dresidual)
    eager = gradients(name, x, *tensors, p)
    wide = tuple(None if part is None else part.double() for part in tensors)
    truth = gradients(name, tuple(part.double() for part in x), *wide, p)
    rstd = (x[0].float().pow(2).mean(-1) + EPS).rsqrt()
    got = prologue_backward(
        dh.clone(), x[0], x[1] if name == "swiglu" else None, name=name, gain=gain, rstd=rstd, in_scale=in_scale,
        da=da, down=down, p=p, seed=SEED, stream=2, dresidual=dresidual, need_dgain=True, need_din_scale=True,
        tile=Tile(block_m=16, block_n=64),
    )  # fmt: skip
    got = {"x0": got.dx, "x1": got.dup, "gain": got.dgain, "in_scale": got.din_scale}
    assert {key for key, grad in got.items() if grad is not None} == set(truth)
    for key, true in truth.items():
        assert got[key].dtype == dtype
        assert_as_close_as_eager(got[key], eager[key], true, key)


@pytest.mark.parametrize("width", [130, MAX_WHOLE_ROW + 8])
def test_rms_norm_of_whole_rows_and_of_wider_ones(width):
    """With everything but a low-rank part, in more rows than one program sums over."""
    torch.manual_seed(0)
    x, dh, dresidual = (torch.randn(20, width).half() for _ in range(3))
    gain, in_scale = torch.randn(width).half(), torch.randn(width).half()
    tensors = (gain, in_scale, None, dh, None, dresidual)
    eager = gradients("rms_norm", (x,), *tensors, 0.0)
    truth = gradients("rms_norm", (x.double(),), *(None if t is None else t.double() for t in tensors), 0.0)
    rstd = (x.float().pow(2).mean(-1) + EPS).rsqrt()
    got = prologue_backward(
        dh.clone(), x, name="rms_norm", gain=gain, rstd=rstd, in_scale=in_scale, dresidual=dresidual, need_dgain=True,
        need_din_scale=True, tile=Tile(block_m=16, block_n=1024),
    )  # fmt: skip
    for key, grad in {"x0": got.dx, "gain": got.dgain, "in_scale": got.din_scale}.items():
        assert_as_close_as_eager(grad, eager[key], truth[key], key)


def test_only_what_is_asked_for():
    x, dh, gain = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    rstd = torch.ones(3)
    before = dh.clone()
    grads = prologue_backward(dh, x, name="rms_norm", gain=gain, rstd=rstd, need_dx=False, need_dgain=True)
    assert grads.dx is None and torch.equal(dh, before)
    assert_as_close_as_eager(grads.dgain, (dh * x).sum(0), (dh.double() * x.double()).sum(0))
    grads = prologue_backward(dh, x, x, name="swiglu", need_dx=False)
    assert grads.dx is None and grads.dup.shape == (3, 8)
    assert torch.equal(prologue_backward(dh).dx, before)


def test_repeats_bit_by_bit_and_takes_no_rows():
    x, dh, gain = torch.randn(40, 8), torch.randn(40, 8), torch.randn(8)
    rstd = (x.pow(2).mean(-1) + EPS).rsqrt()
    runs = [prologue_backward(dh.clone(), x, name="rms_norm", gain=gain, rstd=rstd, need_dgain=True) for _ in range(2)]
    assert torch.equal(runs[0].dx, runs[1].dx) and torch.equal(runs[0].dgain, runs[1].dgain)
    empty = prologue_backward(dh[:0], x[:0], name="rms_norm", gain=gain, rstd=rstd[:0], need_dgain=True)
    assert empty.dx.shape == (0, 8) and torch.equal(empty.dgain, torch.zeros(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", PROLOGUES)
def test_every_matrix_may_be_columns_of_a_buffer(dtype, name):
    torch.manual_seed(0)
    num_rows, width, rank = 17, 33, 5

    def columns(num_cols):
        return torch.randn(num_rows, 2 * num_cols + 3).to(dtype)[:, 1 : 1 + num_cols]

    x = torch.randn(num_rows, 2 * width).to(dtype).split(width, dim=1)[: 2 if name == "swiglu" else 1]
    gain = torch.randn(width).to(dtype) if name == "rms_norm" else None
    down = (torch.randn(rank, width + 2) / width**0.5).to(dtype)[:, :width]
    dh, da, dresidual = columns(width), columns(rank), columns(width)
    tensors = (gain, None, down, dh, da, dresidual)
    eager = gradients(name, x, *tensors, 0.3)
    wide = tuple(None if part is None else part.double() for part in tensors)
    truth = gradients(name, tuple(part.double() for part in x), *wide, 0.3)
    buffer = torch.zeros(num_rows, 2 * width + 4).to(dtype)
    outputs = {"dx_out": buffer[:, :width], "dup_out": buffer[:, width : 2 * width]}
    rstd = (x[0].float().pow(2).mean(-1) + EPS).rsqrt()
    got = prologue_backward(
        dh, *x, name=name, gain=gain, rstd=rstd, da=da, down=down, p=0.3, seed=SEED, stream=2, dresidual=dresidual,
        need_dgain=True, tile=Tile(block_m=16, block_n=64), **outputs,
    )  # fmt: skip
    assert got.dx is outputs["dx_out"] and (got.dup is outputs["dup_out"] if name == "swiglu" else got.dup is None)
    got = {"x0": got.dx, "x1": got.dup, "gain": got.dgain}
    for key, true in truth.items():
        assert_as_close_as_eager(got[key], eager[key], true, key)
    assert not buffer[:, 2 * width :].any() and (name == "swiglu" or not buffer[:, width:].any())

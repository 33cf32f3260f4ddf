"""A bottleneck branch on a linear layer's output."""

import pytest
import torch
from mmpeft_kernels.post_adapter import post_adapter, post_adapter_backward
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.activations import ACTIVATIONS
from mmpeft_fast.ops.dropout import dropout_ref
from tests.closeness import assert_as_close_as_eager

SEED = torch.tensor(0x0123_4567_89AB_CDEF)


def reference(y, down, up, residual, activation, p):
    a = dropout_ref(y, SEED, p, stream=2) @ down.t()
    out = y + 1.7 * (ACTIVATIONS[activation].function(a) @ up.t())
    return (out if residual is None else out + residual), a


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows, num_out, rank", [(1, 7, 3), (33, 130, 20)])
@pytest.mark.parametrize("activation, p, with_residual", [("tanh", 0.0, True), ("gelu", 0.3, False)])
def test_post_adapter(dtype, num_rows, num_out, rank, activation, p, with_residual):
    torch.manual_seed(0)
    y, residual = (torch.randn(num_rows, num_out).to(dtype) for _ in range(2))
    down = (torch.randn(rank, num_out) / num_out**0.5).to(dtype)
    up = (torch.randn(num_out, rank) / rank**0.5).to(dtype)
    tensors = (y, down, up, residual if with_residual else None)
    got = post_adapter(
        y, down, up, scaling=1.7, activation=activation, p=p, seed=SEED, stream=2, residual=tensors[3],
        tile=Tile(block_m=16, block_n=64),
    )  # fmt: skip
    eager = reference(*tensors, activation, p)
    truth = reference(*(None if part is None else part.double() for part in tensors), activation, p)
    for part, plain, true, what in zip(got, eager, truth, ("out", "a")):
        assert part.dtype == dtype
        assert_as_close_as_eager(part, plain, true, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows, num_out, rank", [(1, 7, 3), (33, 130, 20)])
@pytest.mark.parametrize("activation, p", [("tanh", 0.0), ("gelu", 0.3)])
def test_gradients(dtype, num_rows, num_out, rank, activation, p):
    torch.manual_seed(0)
    y, dout = (torch.randn(num_rows, num_out + 3).to(dtype)[:, :num_out] for _ in range(2))
    down = (torch.randn(rank, num_out) / num_out**0.5).to(dtype)
    up = (torch.randn(num_out, rank) / rank**0.5).to(dtype)

    def gradients(*tensors):
        leaves = [part.detach().requires_grad_() for part in tensors]
        return torch.autograd.grad(reference(*leaves, None, activation, p)[0], leaves, dout.to(tensors[0].dtype))

    eager, truth = gradients(y, down, up), gradients(y.double(), down.double(), up.double())
    options = {"scaling": 1.7, "activation": activation, "p": p, "seed": SEED, "stream": 2}
    _, a = post_adapter(y, down, up, tile=Tile(block_m=16, block_n=64), **options)
    buffer = torch.zeros(num_rows, num_out + 2).to(dtype)
    got = post_adapter_backward(dout, y, a, down, up, dy_out=buffer[:, :num_out], **options)
    for part, plain, true, what in zip(got, eager, truth, got._fields):
        assert part.dtype == dtype
        assert_as_close_as_eager(part, plain, true, what)
    assert got.dy.data_ptr() == buffer.data_ptr() and not buffer[:, num_out:].any()
    for name in got._fields:
        needs = {f"need_{field}": field == name for field in got._fields}
        alone = post_adapter_backward(dout, y, a, down, up, **options, **needs)
        assert [field for field in got._fields if getattr(alone, field) is not None] == [name]
        assert torch.equal(getattr(alone, name), getattr(got, name))


def test_errors_and_no_rows():
    y = torch.randn(0, 8)
    out, a = post_adapter(y, torch.randn(2, 8), torch.randn(8, 2))
    assert out.shape == (0, 8) and a.shape == (0, 2)
    grads = post_adapter_backward(out, y, a, torch.randn(2, 8), torch.randn(8, 2))
    assert grads.dy.shape == (0, 8) and not grads.ddown.any() and not grads.dup.any()
    with pytest.raises(ValueError, match="expected a rank of at most 256, got 300"):
        post_adapter(y, torch.randn(300, 8), torch.randn(8, 300))

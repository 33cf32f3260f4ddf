"""da and dU of the branches of a stacked weight."""

import pytest
import torch
from mmpeft_kernels.dy_pass import dy_pass
from mmpeft_kernels.segments import SegmentShape
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.activations import ACTIVATIONS, activation_backward
from tests.closeness import assert_as_close_as_eager

TILE = Tile(block_m=16, block_n=64)


def reference(dy, a, u, segments, scaling, activation):
    da, du, column, rank = [], torch.zeros_like(u), 0, 0
    for num_out, num_ranks in segments:
        rows = slice(column, column + num_out)
        part = a[:, rank : rank + num_ranks]
        da.append(activation_backward(activation, scaling * dy[:, rows] @ u[rows, :num_ranks], part))
        du[rows, :num_ranks] = scaling * dy[:, rows].t() @ ACTIVATIONS[activation].function(part)
        column, rank = column + num_out, rank + num_ranks
    return torch.cat(da, dim=1), du


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "num_rows, segments, activation",
    [
        *((1, (SegmentShape(33, 3),), activation) for activation in ACTIVATIONS),
        (33, (SegmentShape(70, 20), SegmentShape(33, 0), SegmentShape(7, 4)), "tanh"),
    ],
)
def test_dy_pass(dtype, num_rows, segments, activation):
    torch.manual_seed(0)
    num_out, rank = (sum(values) for values in zip(*segments))
    dy = torch.randn(num_rows, num_out + 3).to(dtype)[:, :num_out]
    a, u = torch.randn(num_rows, rank).to(dtype), torch.randn(num_out, max(part.rank for part in segments)).to(dtype)
    got = dy_pass(dy, a, u, segments=segments, scaling=1.7, activation=activation, tile=TILE)
    eager = reference(dy, a, u, segments, 1.7, activation)
    truth = reference(dy.double(), a.double(), u.double(), segments, 1.7, activation)
    for part, plain, true, what in zip(got, eager, truth, ("da", "du")):
        assert part.dtype == dtype
        assert_as_close_as_eager(part, plain, true, what)
    again = dy_pass(dy, a, u, segments=segments, scaling=1.7, activation=activation, tile=TILE)
    assert all(torch.equal(one, two) for one, two in zip(got, again))


def test_many_ranks_wide_parameters_and_needs():
    dy, a, u = torch.randn(20, 24).half(), torch.randn(20, 150).half(), torch.randn(24, 150)
    segments = (SegmentShape(24, 150),)
    da, du = dy_pass(dy, a, u, segments=segments, tile=TILE)
    assert du.dtype == torch.float32
    assert_as_close_as_eager(da, dy @ u.half(), dy.double() @ u.half().double())
    assert_as_close_as_eager(du, (dy.t() @ a).float(), dy.double().t() @ a.double())
    assert dy_pass(dy, a, u, segments=segments, need_da=False, tile=TILE)[0] is None
    assert dy_pass(dy, a, u, segments=segments, need_du=False, tile=TILE)[1] is None
    da, du = dy_pass(dy[:0], a[:0], u, segments=segments)
    assert da.shape == (0, 150) and not du.any()
    with pytest.raises(
        ValueError, match=r"dy_pass: expected segments with 24 columns and rank 150 in all, got \(24, 9\)"
    ):
        dy_pass(dy, a, u, segments=(SegmentShape(24, 9),))


def test_two_launches(monkeypatch):
    from mmpeft_kernels import dy_pass as module

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launched.append(self.kernel)
            return self.kernel[grid]

    launched = []
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    dy_pass(torch.randn(5, 16), torch.randn(5, 4), torch.randn(16, 4), segments=(SegmentShape(16, 4),), tile=TILE)
    assert len(launched) == 2

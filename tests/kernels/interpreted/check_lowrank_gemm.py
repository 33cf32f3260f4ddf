"""The low-rank GEMM in both directions, against its parts in torch."""

import pytest
import torch
from mmpeft_kernels.lowrank_gemm import GemmTile, lowrank_gemm
from mmpeft_kernels.segments import SegmentShape

from mmpeft_fast.ops.dropout import dropout_ref
from tests.closeness import assert_as_close_as_eager

POINTERS = GemmTile(block_m=16, block_n=32, block_k=32)
TMA = GemmTile(block_m=16, block_n=32, block_k=32, use_tma=True)


def forward(x, weight, z, u, scaling, segments, bias, scale, residual):
    outputs, column, rank = [], 0, 0
    for num_out, num_ranks in segments:
        rows = slice(column, column + num_out)
        y = x @ weight[rows].t()
        if num_ranks:
            y = y + scaling * (z[:, rank : rank + num_ranks] @ u[rows, :num_ranks].t())
        outputs.append(y)
        column, rank = column + num_out, rank + num_ranks
    y = torch.cat(outputs, dim=1)
    y = y if bias is None else y + bias
    y = y if scale is None else y * scale
    return y if residual is None else y + residual


def check(call, reference, dtype, **tensors):
    eager = reference(**tensors)
    truth = reference(**{name: None if part is None else part.double() for name, part in tensors.items()})
    got = call(**tensors)
    assert got.dtype == dtype
    assert_as_close_as_eager(got, eager, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "tile, num_rows, width, segments",
    [
        (POINTERS, 1, 33, (SegmentShape(33, 3),)),
        (POINTERS, 33, 130, (SegmentShape(72, 20), SegmentShape(33, 0), SegmentShape(7, 4))),
        (POINTERS, 17, 16, (SegmentShape(40, 0),)),
        (TMA, 1, 40, (SegmentShape(40, 3),)),
        (TMA, 33, 136, (SegmentShape(64, 20), SegmentShape(32, 0), SegmentShape(8, 4))),
        (TMA, 17, 48, (SegmentShape(32, 16), SegmentShape(64, 32))),
    ],
)
@pytest.mark.parametrize("epilogue", [False, True])
def test_forward(dtype, tile, num_rows, width, segments, epilogue):
    torch.manual_seed(0)

    def random(*shape):
        return torch.randn(*shape).to(dtype)

    num_out, rank = (sum(values) for values in zip(*segments))
    tensors = {
        "x": random(num_rows, width),
        "weight": random(num_out, width) / width**0.5,
        "z": random(num_rows, rank) if rank else None,
        "u": random(num_out, max(part.rank for part in segments)) if rank else None,
        **{name: random(num_out) if epilogue else None for name in ("bias", "scale")},
        "residual": random(num_rows, num_out) if epilogue else None,
    }
    check(
        lambda **t: lowrank_gemm(t.pop("x"), t.pop("weight"), tile=tile, scaling=1.7, segments=segments, **t),
        lambda **t: forward(scaling=1.7, segments=segments, **t),
        dtype,
        **tensors,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tile", [POINTERS, TMA], ids=["pointers", "tma"])
@pytest.mark.parametrize("num_rows, depth, num_out, rank", [(1, 8, 40, 2), (33, 56, 72, 70)])
def test_dx(dtype, tile, num_rows, depth, num_out, rank):
    torch.manual_seed(0)
    tensors = {
        name: torch.randn(*shape).to(dtype)
        for name, shape in {
            "x": (num_rows, depth), "weight": (depth, num_out), "z": (num_rows, rank), "u": (rank, num_out),
        }.items()
    }  # fmt: skip
    check(
        lambda x, weight, z, u: lowrank_gemm(x, weight, tile=tile, transposed=False, z=z, u=u),
        lambda x, weight, z, u: x @ weight + z @ u,
        dtype,
        **tensors,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tile", [POINTERS, TMA], ids=["pointers", "tma"])
@pytest.mark.parametrize("num_rows, depth, num_out, rank", [(1, 8, 40, 2), (33, 56, 72, 70)])
@pytest.mark.parametrize("into", [False, True])
def test_dx_with_dropout_of_the_low_rank_part(dtype, tile, num_rows, depth, num_out, rank, into):
    torch.manual_seed(0)
    seed = torch.tensor(0x0123_4567_89AB_CDEF)
    shapes = {
        "x": (num_rows, depth),
        "weight": (depth, num_out),
        "z": (num_rows, rank),
        "residual": (num_rows, num_out),
    }
    tensors = {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}
    u = torch.randn(rank, num_out) / rank**0.5  # wider than z, as trained parameters are

    def reference(x, weight, z, residual):
        y = x @ weight + dropout_ref(z @ u.to(dtype).to(z.dtype), seed, 0.3, stream=2)
        return y + residual if into else y

    def call(x, weight, z, residual):
        given = {"residual": residual, "out": residual} if into else {}
        options = {"p": 0.3, "seed": seed, "stream": 2, **given}
        return lowrank_gemm(x, weight, tile=tile, transposed=False, z=z, u=u, **options)

    check(call, reference, dtype, **tensors)


def test_wide_factor_strided_operands_and_given_output():
    x, weight, z = torch.randn(9, 40)[:, :33].half(), torch.randn(20, 40)[:, :33].half(), torch.randn(9, 6).half()
    u = torch.randn(20, 6)
    buffer = torch.zeros(9, 30, dtype=torch.float16)
    out = lowrank_gemm(x, weight, tile=POINTERS, z=z, u=u, out=buffer[:, 4:24], num_programs=1)
    eager = x @ weight.t() + z @ u.half().t()
    truth = x.double() @ weight.double().t() + z.double() @ u.half().double().t()
    assert_as_close_as_eager(out, eager, truth)
    assert not buffer[:, :4].any() and not buffer[:, 24:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tile", [POINTERS, TMA], ids=["pointers", "tma"])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 16, 100, 512])
def test_ranks_between_columns_of_wider_buffers(dtype, tile, transposed, rank):
    torch.manual_seed(0)
    num_rows, depth, num_out = 7, 40, 24

    def columns(num_rows, num_cols):
        return torch.randn(num_rows, num_cols + 24).to(dtype)[:, 8 : 8 + num_cols]

    tensors = {
        "x": columns(num_rows, depth),
        "weight": columns(num_out, depth) if transposed else columns(depth, num_out),
        "z": columns(num_rows, rank) / rank**0.5,
        "u": columns(num_out, rank) if transposed else columns(rank, num_out),
        "residual": columns(num_rows, num_out),
    }
    buffer = torch.zeros(num_rows, num_out + 16).to(dtype)

    def reference(x, weight, z, u, residual):
        return x @ (weight.t() if transposed else weight) + 1.7 * (z @ (u.t() if transposed else u)) + residual

    def call(x, weight, **operands):
        return lowrank_gemm(
            x, weight, tile=tile, transposed=transposed, scaling=1.7, out=buffer[:, 8 : 8 + num_out], **operands
        )

    check(call, reference, dtype, **tensors)
    assert buffer[:, 8 : 8 + num_out].any() and not buffer[:, :8].any() and not buffer[:, 8 + num_out :].any()


def test_errors_and_no_rows():
    x, weight = torch.randn(4, 6), torch.randn(8, 6)
    with pytest.raises(ValueError, match=r"expected segments with 8 columns and rank 0 in all, got \(7, 0\)"):
        lowrank_gemm(x, weight, tile=POINTERS, segments=(SegmentShape(7, 0),))
    with pytest.raises(ValueError, match="expected dropout with transposed=False alone"):
        lowrank_gemm(x, weight, tile=POINTERS, p=0.1)
    with pytest.raises(ValueError, match=r"expected x 16-byte aligned .* got a row stride of 6 4-byte elements"):
        lowrank_gemm(x, weight, tile=TMA)
    segments = (SegmentShape(24, 0), SegmentShape(40, 0))
    with pytest.raises(ValueError, match=r"expected segments of whole tiles of 32 for TMA, got \[24\]"):
        lowrank_gemm(torch.randn(4, 8), torch.randn(64, 8), tile=TMA, segments=segments)
    with pytest.raises(ValueError, match="one segment with transposed=False, got 2"):
        lowrank_gemm(x, weight.t(), tile=POINTERS, transposed=False, segments=(SegmentShape(4, 0), SegmentShape(4, 0)))
    assert lowrank_gemm(x[:0], weight, tile=POINTERS).shape == (0, 8)
    with pytest.raises(ValueError, match="expected block_n to be a power of two, got 48"):
        GemmTile(block_m=16, block_n=48, block_k=16)

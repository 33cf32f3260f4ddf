"""Numbers of the CUDA kernels, emulated on the CPU and, where there is one, on a GPU: ragged shapes, strides, segments,
every option."""

import pytest
import torch

from mmpeft_fast.ops.activations import ACTIVATIONS
from tests.closeness import assert_as_close_as_eager

HALVES = (torch.bfloat16, torch.float16)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16, pitch: int | None = None) -> torch.Tensor:
    """A random tensor; with a pitch, a column slice of a NaN-filled buffer of that many columns."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if pitch is None:
        return values
    buffer = torch.full((shape[0], pitch), torch.nan, dtype=dtype)
    buffer[:, : shape[1]] = values
    return buffer[:, : shape[1]]


def padded(columns: int) -> int:
    return -(-columns // 8) * 8


def of_dtype(tensor, dtype):
    """For a definition, dense: oneDNN's bf16 product with AMX reads what lies between an operand's rows (NaN here)."""
    return tensor.to(dtype).contiguous()


def block_diagonal(z, u, num_outs, ranks):
    """The low-rank part of every segment, side by side."""
    u_parts = u.split(num_outs)
    return torch.cat([part @ rows[:, :r].T for part, rows, r in zip(z.split(ranks, 1), u_parts, ranks)], dim=1)


# GEMM -----------------------------------------------------------------------------------------------------------------

FORWARD_CASES = [
    pytest.param(130, (256,), 64, (16,), 256, id="wide"),
    pytest.param(7, (33,), 130, (5,), 128, id="ragged"),
    pytest.param(1, (8,), 8, (1,), 128, id="one-row"),
    pytest.param(300, (264,), 200, (72,), 256, id="rank-of-two-steps"),
    pytest.param(140, (192, 64, 70), 72, (8, 16, 24), 128, id="segments"),
    pytest.param(65, (320, 64, 128), 264, (24, 0, 64), 256, id="segment-without-rank"),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("num_rows", "num_outs", "depth", "ranks", "block_n"), FORWARD_CASES)
def test_gemm_forward(kernels, num_rows, num_outs, depth, ranks, block_n, dtype):
    num_out, scaling = sum(num_outs), 0.75
    x = randn(num_rows, depth, seed=0, dtype=dtype, pitch=padded(depth) + 8)
    weight = randn(num_out, depth, seed=1, dtype=dtype, pitch=padded(depth))
    z = randn(num_rows, sum(ranks), seed=2, dtype=dtype, pitch=padded(sum(ranks)))
    # What lies beyond a segment's rank must not count, not even as 0 * NaN.
    u = torch.full((num_out, padded(max(ranks) + 1)), torch.nan, dtype=dtype)
    for rows, rank in zip(u.split(list(num_outs)), ranks):
        rows[:, :rank] = randn(rows.shape[0], rank, seed=3, dtype=dtype)
    bias, scale = randn(num_out, seed=4, dtype=dtype), randn(num_out, seed=5, dtype=torch.float32)
    residual = randn(num_rows, num_out, seed=6, dtype=dtype, pitch=padded(num_out))
    out = kernels.lowrank_gemm(
        x, weight, z=z, u=u, num_outs=list(num_outs), ranks=list(ranks), scaling=scaling, bias=bias, scale=scale,
        residual=residual, block_n=block_n, num_programs=3,
    )  # fmt: skip

    def definition(dtype):
        wide = [of_dtype(tensor, dtype) for tensor in (x, weight, z, u, bias, scale, residual)]
        product = wide[0] @ wide[1].T + scaling * block_diagonal(*wide[2:4], list(num_outs), list(ranks))
        return (product + wide[4]) * wide[5] + wide[6]

    assert_as_close_as_eager(out, definition(dtype), definition(torch.float64), "out")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("num_rows", "num_out", "depth", "rank", "block_n"),
    [(130, 256, 64, 16, 256), (7, 40, 130, 5, 128), (1, 1, 1, 0, 128), (200, 328, 136, 72, 256), (64, 33, 200, 0, 256)],
)
def test_gemm_dx(kernels, num_rows, num_out, depth, rank, block_n, dtype):
    dy = randn(num_rows, depth, seed=0, dtype=dtype, pitch=padded(depth))
    weight = randn(depth, num_out, seed=1, dtype=dtype, pitch=padded(num_out) + 8)
    da = randn(num_rows, rank, seed=2, dtype=dtype, pitch=padded(rank)) if rank else None
    down = randn(rank, num_out, seed=3, dtype=dtype, pitch=padded(num_out)) if rank else None
    out = kernels.lowrank_gemm(dy, weight, z=da, u=down, transposed=False, block_n=block_n, num_programs=2)

    def definition(dtype):
        product = dy.to(dtype) @ weight.to(dtype)
        return product + da.to(dtype) @ down.to(dtype) if rank else product

    assert_as_close_as_eager(out, definition(dtype), definition(torch.float64), "dx")


def test_gemm_writes_nothing_outside_of_its_columns_and_adds_in_place(kernels):
    x, weight = randn(70, 64, seed=0), randn(40, 64, seed=1)
    buffer = randn(80, 64, seed=2)
    before = buffer.clone()
    out = buffer[5:75, 8:48]
    kernels.lowrank_gemm(x, weight, residual=out, out=out)
    truth = before[5:75, 8:48].double() + x.double() @ weight.double().T
    assert_as_close_as_eager(out, before[5:75, 8:48] + x @ weight.T, truth)
    out.copy_(before[5:75, 8:48])
    assert torch.equal(buffer, before)


def test_gemm_visits_every_tile_once(emulated):
    for num_tiles_m, num_tiles_n in ((1, 1), (7, 3), (8, 5), (9, 1), (33, 7)):
        assert (emulated.grouped_tile_visits(num_tiles_m, num_tiles_n) == 1).all()


@pytest.mark.parametrize("shift", [1, 4])
def test_gemm_refuses_what_tma_cannot_take(kernels, shift):
    x, weight = randn(8, 64, seed=0), randn(16, 64, seed=1)
    misaligned = "716|16-byte"  # cudaErrorMisalignedAddress, or the entry's words
    with pytest.raises(ValueError, match=misaligned):
        kernels.lowrank_gemm(randn(8, 72, seed=0)[:, shift : 64 + shift], weight)
    with pytest.raises(ValueError, match=misaligned):
        kernels.lowrank_gemm(randn(8, 64 + shift, seed=0)[:, :64], weight)
    with pytest.raises(ValueError, match=r"cudaError_t 1|64"):  # cudaErrorInvalidValue
        kernels.lowrank_gemm(x, weight, num_outs=[8, 8], ranks=[0, 0])


# dy pass --------------------------------------------------------------------------------------------------------------

DY_CASES = [
    pytest.param(130, (256,), (16,), "identity", 64, id="r16"),
    pytest.param(7, (33,), (5,), "tanh", 64, id="ragged"),
    pytest.param(1, (8,), (1,), "gelu", 64, id="one-row"),
    pytest.param(200, (300,), (32,), "silu", 128, id="r32"),
    pytest.param(150, (130, 40, 7), (8, 0, 24), "relu", 64, id="segments"),
    pytest.param(66, (130,), (64,), "identity", 128, id="r64"),
    pytest.param(66, (129, 10), (130, 33), "tanh", 64, id="two-rank-blocks"),
]


@pytest.mark.parametrize(("num_rows", "num_outs", "ranks", "activation", "rows_per_chunk"), DY_CASES)
@pytest.mark.parametrize(("dtype", "u_dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_dy_pass(kernels, num_rows, num_outs, ranks, activation, rows_per_chunk, dtype, u_dtype):
    num_out, width, scaling = sum(num_outs), max(ranks) + 1, 0.5
    dy = randn(num_rows, num_out, seed=0, dtype=dtype, pitch=num_out + 3)
    a = randn(num_rows, sum(ranks), seed=1, dtype=dtype)
    u = randn(num_out, width, seed=2, dtype=dtype).to(u_dtype)
    da, du = kernels.dy_pass(
        dy, a, u, num_outs=num_outs, ranks=ranks, scaling=scaling, activation=activation, rows_per_chunk=rows_per_chunk
    )

    def definition(dtype):
        f, derivative = ACTIVATIONS[activation].function, ACTIVATIONS[activation].derivative
        das, dus = [], []
        parts = zip(dy.split(num_outs, 1), a.split(ranks, 1), u.split(num_outs), ranks)
        for dy_part, a_part, u_part, rank in parts:
            dy_part, a_part, u_part = (of_dtype(part, dtype) for part in (dy_part, a_part, u_part[:, :rank]))
            das.append(scaling * (dy_part @ u_part) * derivative(a_part))
            dus.append(torch.zeros(dy_part.shape[1], width, dtype=dtype))
            dus[-1][:, :rank] = scaling * (dy_part.T @ f(a_part))
        return torch.cat(das, 1), torch.cat(dus)

    for name, got, eager, truth in zip(("da", "dU"), (da, du), definition(dtype), definition(torch.float64)):
        assert_as_close_as_eager(got, eager, truth, name)
    for rows, rank in zip(du.split(num_outs), ranks):
        assert not rows[:, rank:].any(), "columns beyond a segment's rank"


def test_dy_pass_computes_only_what_is_asked(kernels):
    dy, a, u = randn(40, 24, seed=0), randn(40, 8, seed=1), randn(24, 8, seed=2)
    both = kernels.dy_pass(dy, a, u, num_outs=[24], ranks=[8])
    da, nothing = kernels.dy_pass(dy, a, u, num_outs=[24], ranks=[8], need_du=False)
    assert nothing is None and torch.equal(da, both[0])
    nothing, du = kernels.dy_pass(dy, a, u, num_outs=[24], ranks=[8], need_da=False)
    assert nothing is None and torch.equal(du, both[1])

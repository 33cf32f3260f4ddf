"""Dropout bits, activations, the bottleneck's passes and post branches in C++."""

import pytest
import torch

from mmpeft_fast.ops import dropout, kernels_cpu, kernels_torch
from mmpeft_fast.ops.activations import ACTIVATIONS
from mmpeft_fast.ops.kernel_set import Mask
from tests.closeness import assert_as_close_as_eager
from tests.csrc.arrays import LAYOUTS, assert_same_set, contiguous, strided


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 0x1234_5678_9ABC_DEF0])
def test_the_bits_are_those_of_every_provider(seed, instruction_set):
    seed = torch.tensor(seed)
    for num_rows, num_cols in ((1, 1), (3, 7), (5, 8), (4, 33), (2, 512), (3, 1300), (0, 5), (5, 0)):
        for p, stream in ((0.05, 0), (0.5, 1), (2**-16, 2), (1 - 2**-16, 2**31)):
            expected = dropout.keep_bits(seed, num_rows, num_cols, p, stream=stream)
            for itemsize in (2, 4, 8):
                got = kernels_cpu.keep_bits(seed, num_rows, num_cols, p, stream=stream, itemsize=itemsize)
                assert got.element_size() == itemsize and torch.equal(got, expected.to(got.dtype)), (num_cols, p)


@pytest.mark.parametrize("p", [0.0, 2**-18, 1.0, -0.5, float("nan")])
def test_probabilities_without_a_mask_raise(p):
    with pytest.raises(ValueError, match="keep_bits: expected a dropout probability"):
        torch.ops.mmpeft_fast_c.keep_bits(torch.tensor(1), p, 0, torch.empty(2, 8, dtype=torch.int16))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_over_their_whole_range(name, dtype, instruction_set):
    a = torch.cat((torch.linspace(-30, 30, 999), torch.linspace(-0.3, 0.3, 333), torch.tensor([0.0, -0.0, 200, -200])))
    a = a.to(dtype)[None]
    z = torch.empty_like(a)
    torch.ops.mmpeft_fast_c.activation(name, a, None, z)
    function, derivative = ACTIVATIONS[name]
    assert_as_close_as_eager(z, function(a), function(a.double()), name)
    dz = torch.randn(a.shape).to(dtype)
    da = torch.empty_like(a)
    torch.ops.mmpeft_fast_c.activation(name, a, dz, da)
    truth = dz.double() * derivative(a.double())
    eager = (dz.float() * derivative(a.float())).to(dtype)
    assert_as_close_as_eager(da, eager, truth, f"{name}'s derivative")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_non_finite_values(name, dtype, instruction_set):
    a = torch.tensor([[float("inf"), float("-inf"), float("nan")] * 7], dtype=dtype)
    z = torch.empty_like(a)
    torch.ops.mmpeft_fast_c.activation(name, a, None, z)
    # Not in a's dtype: torch's own float32 gelu of infinity is nan.
    torch.testing.assert_close(z.double(), ACTIVATIONS[name].function(a.double()), equal_nan=True)


def test_exponentials_of_every_magnitude(instruction_set):
    """silu of large negative values rests on exp overflowing to infinity, and tanh on it staying finite enough."""
    a = torch.linspace(-130, 130, 4001)[None]
    for name in ("silu", "tanh"):
        z = torch.empty_like(a)
        torch.ops.mmpeft_fast_c.activation(name, a, None, z)
        function, info = ACTIVATIONS[name].function, torch.finfo(torch.float32)
        truth = function(a.double())
        allowed = 2 * (function(a).double() - truth).abs() + 8 * info.eps * truth.abs() + info.tiny
        assert ((z.double() - truth).abs() <= allowed).all(), name


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dy_pass(name, layout, dtype, instruction_set):
    num_rows, widths, ranks = 33, (7, 130), (5, 16)
    dys = [LAYOUTS[layout](num_rows, width, dtype=dtype) for width in widths]
    a = [LAYOUTS[layout](num_rows, rank, dtype=dtype) for rank in ranks]
    ups = [contiguous(width, rank, dtype=torch.float32) for width, rank in zip(widths, ranks, strict=True)]
    for need_da, need_dup in (([True, True], [True, True]), ([True, False], [False, True]), ([False] * 2, [False] * 2)):
        options = {
            "scalings": [0.5, 1.0], "activations": [name] * 2, "need_da": need_da, "need_dup": need_dup,
        }  # fmt: skip
        assert_same_set(kernels_cpu.dy_pass, kernels_torch.dy_pass, (dys, a, ups), options, f"{name} {need_da}")


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, 7), (1, 33), (17, 130)], ids=str)
def test_post_branch(name, p, shape, dtype):
    num_rows, width = shape
    y = strided(num_rows, width, dtype=dtype)
    down, up = contiguous(6, width, dtype=torch.float32), contiguous(width, 6, dtype=torch.float32)
    mask = Mask(p, 3, torch.tensor(5)) if p else None
    options = {"scaling": 0.5, "activation": name, "mask": mask}
    for residual in (None, strided(num_rows, width, dtype=dtype)):
        assert_same_set(
            kernels_cpu.post_branch, kernels_torch.post_branch, (y, down, up), options | {"residual": residual}, "out"
        )

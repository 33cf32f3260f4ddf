"""Sums of partials."""

import pytest
import torch
from mmpeft_kernels.reduction import sum_partials

from tests.closeness import assert_as_close_as_eager


@pytest.mark.parametrize("num_parts, shape", [(1, (3,)), (33, (7, 33)), (130, (2, 40)), (4, (0, 3)), (0, (5,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sum(num_parts, shape, dtype):
    partial = torch.randn(num_parts, *shape)
    got = sum_partials(partial, dtype, scaling=1.7)
    assert got.dtype == dtype
    assert_as_close_as_eager(got, (1.7 * partial.sum(0)).to(dtype), 1.7 * partial.double().sum(0))

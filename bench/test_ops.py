"""The registry under pytest-benchmark: `python -m pytest bench --benchmark-group-by=param:op`, with its own
comparison and history options. Not part of the tests: timings say nothing about right or wrong."""

import pytest
import torch

from bench.registry import OPS, Shape, make_case


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("implementation", ["frozen", "eager", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_op(benchmark, op, implementation, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = make_case(op, Shape(), dtype=getattr(torch, dtype), device=device)

    def run():
        case.run(implementation)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)

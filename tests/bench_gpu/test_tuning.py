"""What the tuner tries, and that what it forces is what runs."""

import contextlib
import importlib.util
import json

import pytest
import torch

from bench.gpu import tuned, tuning
from bench.gpu.shapes import DRY, GPU
from bench.gpu.tuning import KERNELS, Problem
from mmpeft_fast.ops import dispatch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("kernel", KERNELS)
def test_candidates_are_tiles(kernel):
    from mmpeft_kernels.lowrank_gemm import GemmTile
    from mmpeft_kernels.tile import Tile

    for each, problem in tuning.problems(GPU):
        if each == kernel:
            tiles = tuning.tiles(kernel, problem)
            assert tiles[0] is None and len(tiles) > 2
            assert len({json.dumps(tile) for tile in tiles}) == len(tiles)
            for fields in tiles[1:]:
                tile = (GemmTile if "gemm" in kernel or kernel == "masked_dx" else Tile)(**fields)
                assert tile.block_m * tile.block_n <= 128 * 256


def test_problems_of_whole_steps_come_first_and_have_the_buckets_of_dispatch():
    assert {(p.dims, p.r, p.m, p.p) for _, p in tuning.problems(GPU)} == set(GPU.problems)
    assert tuning.problems(GPU)[0][1] == Problem("llama-7b", "qkv", 2800, 128, 0.05)
    problem = Problem("llama-7b", "qkv", 2800, 128)
    assert tuning.sizes("shrink", problem) == {"m": 2800, "k": 4096, "r": 384}
    assert tuning.sizes("dy_pass", problem) == {"m": 2800, "n": 12288, "r": 128}
    assert tuning.sizes("lowrank_gemm fwd", problem) == {"m": 2800, "n": 12288, "k": 4096, "r": 128}
    assert tuning.sizes("lowrank_gemm_gluon dx", problem) == {"m": 2800, "n": 4096, "k": 12288, "r": 0}
    assert len(tuning.problems(DRY)) == 4 * len(KERNELS)


@needs_triton
@pytest.mark.parametrize("kernel", ["shrink", "ddown", "dy_pass", "lowrank_gemm fwd", "masked_dx"])
def test_a_forced_tile_and_the_sizes_of_buckets_reach_the_launch(kernel, monkeypatch):
    """The kernel set asks dispatch with the sizes that rows are filed under, and gets what is forced."""
    from mmpeft_fast.ops import kernels_triton

    problem, asked = Problem("tiny", "qkv", 5, 2), []
    case, operands = tuning._case(kernel, problem, "fp32", "meta")
    fields = {"block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 1}
    fields |= {"block_k": 16, "use_tma": False} if "gemm" in kernel or kernel == "masked_dx" else {}
    with tuned.forced(kernel, fields):
        forced = dispatch.tile_fields

        def asking(name, x, **sizes):
            asked.append((name, sizes, forced(name, x, **sizes)))
            return forced(name, x, **sizes)

        monkeypatch.setattr(dispatch, "tile_fields", asking)
        # Launches need a device; the question comes before.
        with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
            case.run(kernels_triton, **operands)
        monkeypatch.undo()
    assert (kernel, tuning.sizes(kernel, problem), fields) in asked
    assert dispatch.tile_fields is not forced and not [name for name, _, tile in asked if tile and name != kernel]


@pytest.mark.parametrize("kernel", ["shrink", "dy_pass", "ddown", "lowrank_gemm fwd"])
def test_rows_of_a_problem_say_how_fast(kernel):
    """Without tiles: what is timed beside them."""
    rows = list(tuning.time_tiles(kernel, ["tiny", "gate_up", 5, 2, 0.05], [], "fp32", "cpu"))
    names = {"lowrank_gemm fwd": ["torch", "bare", "layout"], "dy_pass": ["torch"]}.get(kernel, [])
    assert [row["tile"] for row in rows] == names
    speed = "gflop_s" if "gemm" in kernel else "gb_s"
    assert all(row[speed] > 0 and row["sizes"]["m"] == 5 and row["host_ms"] > 0 for row in rows)
    if kernel == "dy_pass":  # dy and U, a and da, dU
        num_bytes = 4 * (5 * 48 + 2 * 48 * 2 + 2 * 5 * 4)
        assert rows[0]["gb_s"] == pytest.approx(num_bytes / rows[0]["p50_ms"] / 1e6)


def test_adapters_are_float32_over_a_bf16_base():
    _, operands = tuning._case("shrink", Problem("tiny", "qkv", 5, 2), "bf16", "cpu")
    assert operands["down"].dtype == torch.float32 and operands["x"][0].dtype == torch.bfloat16

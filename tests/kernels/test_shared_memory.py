"""Shared memory by arithmetic against the figure of the compiled kernel."""

import pytest
import torch
import triton
from mmpeft_kernels import aot, ddown, dy_pass, lowrank_gemm, post_adapter, prefix, prologue_backward, shrink
from mmpeft_kernels.launches import recorded
from mmpeft_kernels.lowrank_gemm import GemmTile
from mmpeft_kernels.segments import SegmentShape
from mmpeft_kernels.shared_memory import LIMITS, Footprint
from mmpeft_kernels.tile import Tile, assumed_architecture

from tests.kernels.footprints import footprint_of

TABLE = aot.read_table()
# How far above the compiler's figure the arithmetic may be where it decides (the smallest limit and more): a loop that
# pipelines fewer of its loads than the formula takes for granted.
_SLACK, _MATTERS = 1.7, min(LIMITS.values())
# A kernel without a formula (element-wise, row statistics) may take this much: far below every device's limit.
_NEEDS_NO_ARITHMETIC = 16 * 1024
pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")


def assert_bounds(launch: dict, shared_bytes: int, name: str = "") -> None:
    footprint, tile = footprint_of(launch)
    bound = footprint.bytes(tile)
    assert shared_bytes <= bound, f"{name} {footprint} {tile}: {bound} by arithmetic, {shared_bytes} compiled"
    assert bound <= max(_MATTERS, _SLACK * shared_bytes), f"{name} {footprint} {tile}: {bound} against {shared_bytes}"


@pytest.mark.parametrize("version", sorted(TABLE["resources"]))
def test_arithmetic_bounds_every_launch_of_the_table(version):
    for name, row in TABLE["resources"][version].items():
        if footprint_of(TABLE["launches"][name]) is not None:
            assert_bounds(TABLE["launches"][name], row["shared_bytes"], name)
        else:
            assert row["shared_bytes"] <= _NEEDS_NO_ARITHMETIC, name


def test_every_launch_of_the_table_was_fitted_by_arithmetic():
    for name, launch in TABLE["launches"].items():
        if (found := footprint_of(launch)) is not None:
            footprint, tile = found
            limit = min(LIMITS[arch] for arch in (launch["arch"], *launch["also"]))
            assert footprint.bytes(tile) <= limit, name


M, K, R = 2800, 4096, 128


def _empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls(tile, gemm_tile):
    """One launch of every kernel at rank 128 with adapters in float32: what crashed on an H200 among them."""
    x, wide_u, down = _empty(M, K), _empty(K, R, dtype=torch.float32), _empty(R, K, dtype=torch.float32)
    z, mask = _empty(M, R), {"p": 0.05, "seed": _empty(dtype=torch.int64)}
    heads, kv = _empty(2, M, 8, 128).transpose(1, 2), _empty(8, 20, 128)
    lse = _empty(2, 8, M, dtype=torch.float32)
    segments = (SegmentShape(K, R),)
    return {
        "shrink": lambda: shrink.shrink(x, down, tile=tile, **mask),
        "prologue_backward": lambda: prologue_backward.prologue_backward(
            x, x, x, name="swiglu", da=z, down=down, tile=tile, **mask
        ),
        "ddown": lambda: ddown.ddown(z, x, x, name="swiglu", out_dtype=torch.float32, tile=tile, **mask),
        "dy_pass": lambda: dy_pass.dy_pass(x, z, wide_u, segments=segments, tile=tile),
        "post_adapter": lambda: post_adapter.post_adapter(x, down, wide_u, residual=x, tile=tile, **mask),
        "prefix": lambda: prefix.merge_prefix_(heads, kv, kv, heads, lse, scale=1.0),
        "prefix_backward": lambda: prefix.prefix_backward_(heads, heads, kv, kv, heads, lse, heads, scale=1.0),
        "lowrank_gemm": lambda: lowrank_gemm.lowrank_gemm(x, _empty(K, K), tile=gemm_tile, z=z, u=wide_u),
    }  # fmt: skip


# Tiles that were tried on the H200 and did not fit there with adapters in float32.
LARGE = Tile(block_m=128, block_n=128, num_warps=8, num_stages=3)
LARGE_GEMM = GemmTile(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3)


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
@pytest.mark.parametrize("kernel", _calls(LARGE, LARGE_GEMM))
def test_what_is_launched_fits_by_arithmetic(kernel, arch):
    records: list[dict] = []
    with assumed_architecture(arch), recorded(records):
        _calls(LARGE, LARGE_GEMM)[kernel]()
    footprint, tile = footprint_of(records[0] | {"arch": arch})
    assert isinstance(footprint, Footprint) and footprint.kernel == kernel and footprint.arch == arch
    assert footprint.bytes(tile) <= LIMITS[arch]


@pytest.mark.parametrize("kernel, arch", [("dy_pass", 80), ("shrink", 89), ("lowrank_gemm", 90), ("ddown", 90)])
def test_arithmetic_bounds_what_the_compiler_makes(kernel, arch):
    records: list[dict] = []
    with assumed_architecture(arch), recorded(records):
        _calls(LARGE, LARGE_GEMM)[kernel]()
    launch = records[0] | {"arch": arch}
    shared = aot.compiled(launch).metadata.shared
    assert_bounds(launch, shared)
    assert shared <= LIMITS[arch]


def test_operands_wider_than_the_activations_take_no_more():
    """The GEMM that asked for 278,528 bytes with U in float32: half as many ranks a step, the same tile."""
    made = []
    for dtype in (torch.bfloat16, torch.float32):
        records: list[dict] = []
        with assumed_architecture(90), recorded(records):
            tile = lowrank_gemm.default_tile(90, 2)
            u = _empty(K, R, dtype=dtype)
            lowrank_gemm.lowrank_gemm(_empty(M, K), _empty(K, K), tile=tile, z=_empty(M, R), u=u)
        made.append(records[0] | {"arch": 90})
    (narrow, asked), (wide, runs) = (footprint_of(launch) for launch in made)
    assert wide.wide and not narrow.wide and asked == runs
    assert wide.bytes(runs) <= narrow.bytes(asked) <= LIMITS[90]
    assert made[0]["constants"]["BLOCK_R"] == 2 * made[1]["constants"]["BLOCK_R"]
    shared = [aot.compiled(launch).metadata.shared for launch in made]
    assert shared[1] <= shared[0] <= LIMITS[90]

"""The warp-specialised GEMM without a GPU: what its launcher refuses, and what the compiler makes of it.

Its numbers are checked on a GPU (sm_90) alone: Triton's interpreter does not run Gluon.
"""

import pytest
import torch
import triton
from mmpeft_kernels import aot
from mmpeft_kernels.lowrank_gemm_gluon import DEFAULT_TILE, lowrank_gemm
from mmpeft_kernels.segments import SegmentShape

from tests.closeness import assert_as_close_as_eager

NAME = "sm_90 bfloat16 lowrank_gemm gluon forward bias residual"


def operands(num_rows=4, depth=64, num_out=64, rank=8, dtype=torch.bfloat16):
    shapes = {"x": (num_rows, depth), "weight": (num_out, depth), "z": (num_rows, rank), "u": (num_out, rank)}
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4, 64)}, r"all bfloat16 or all float16, got \['bfloat16', 'float32'\]"),
        ({"u": torch.zeros(64, 16).bfloat16()}, r"expected ranks of 0 or u's width 16 for TMA, got \[8\]"),
        ({"z": torch.zeros(4, 9).bfloat16()[:, :8]}, "expected z 16-byte aligned with a row stride of whole 16 bytes"),
        (
            {"segments": (SegmentShape(32, 8), SegmentShape(32, 0))},
            r"segments of whole tiles of 256 for TMA, got \[32\]",
        ),
        ({"segments": (SegmentShape(64, 4),)}, r"segments with 64 columns and rank 8 in all, got \(64, 4\)"),
        ({"transposed": False, "segments": (SegmentShape(32, 8), SegmentShape(32, 0))}, "one segment .* got 2"),
        (
            {"scale": torch.ones(64), "residual": torch.zeros(4, 64).bfloat16()},
            "expected a scale or a residual, got both",
        ),
    ],
)
def test_what_it_cannot_take_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        lowrank_gemm(**operands() | change)


def test_no_rows_need_no_launch():
    assert lowrank_gemm(**operands(num_rows=0)).shape == (0, 64)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing compiles")
def test_compiles_to_one_warp_of_copies_and_two_warpgroups_of_products():
    launch = aot.read_table()["launches"][NAME]
    compiled = aot.compiled(launch)
    ptx = compiled.asm["ptx"]
    producer_and_consumer = DEFAULT_TILE.num_warps * 32 + 128
    assert f".reqntid {producer_and_consumer}" in ptx
    assert "setmaxnreg.dec" in ptx and "setmaxnreg.inc" in ptx
    assert "mbarrier.try_wait" in ptx and "cp.async.bulk.tensor.2d.global.shared" in ptx
    sass = aot.sass(compiled.asm["cubin"])
    # Four steps of 16 for z U and four for x W, none of them waiting for another: the compiler serialised nothing.
    assert sass.count("HGMMA.64x256x16.F32.BF16") == 8
    assert sass.count("WARPGROUP.DEPBAR.LE gsb0, 0x1") == 2
    assert "UTMALDG.2D" in sass and "UTMASTG.2D" in sass and "STL" not in sass


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "num_rows, depth, segments",
    [
        (1, 64, ((64, 8),)),
        (33, 136, ((256, 16), (512, 0), (72, 16))),
        (1000, 1032, ((768, 128), (256, 128))),
    ],
)
@pytest.mark.parametrize("epilogue", ["none", "bias residual", "bias scale"])
def test_forward_and_dx_on_a_gpu(dtype, num_rows, depth, segments, epilogue):
    torch.manual_seed(0)
    segments = tuple(SegmentShape(*segment) for segment in segments)
    num_out, rank = (sum(values) for values in zip(*segments))
    width = max(segment.rank for segment in segments)

    def random(*shape):
        return torch.randn(*shape, device="cuda").to(dtype)

    extras = {"bias": random(num_out), "scale": random(num_out), "residual": random(num_rows, num_out)}
    tensors = {
        "x": random(num_rows, depth), "weight": random(num_out, depth) / depth**0.5, "z": random(num_rows, rank),
        "u": random(num_out, width) / max(1, width) ** 0.5,
    } | {name: tensor for name, tensor in extras.items() if name in epilogue.split()}  # fmt: skip

    def forward(x, weight, z, u, bias=None, scale=None, residual=None):
        blocks = torch.zeros(num_out, rank, dtype=u.dtype, device=u.device)
        column = first = 0
        for segment in segments:
            rows = slice(column, column + segment.num_out)
            blocks[rows, first : first + segment.rank] = u[rows, : segment.rank]
            column, first = column + segment.num_out, first + segment.rank
        y = x @ weight.t() + 1.7 * (z @ blocks.t())
        y = y if bias is None else y + bias
        y = y if scale is None else y * scale
        return y if residual is None else y + residual

    wide = {name: tensor.double() for name, tensor in tensors.items()}
    got = lowrank_gemm(segments=segments, scaling=1.7, **tensors)
    assert_as_close_as_eager(got, forward(**tensors), forward(**wide))
    assert torch.equal(got, lowrank_gemm(segments=segments, scaling=1.7, num_programs=3, **tensors))
    down, da = random(16, depth), random(num_rows, 16)
    dx = lowrank_gemm(got, tensors["weight"], transposed=False, z=da, u=down)
    truth = got.double() @ wide["weight"] + da.double() @ down.double()
    assert_as_close_as_eager(dx, got @ tensors["weight"] + da @ down, truth)

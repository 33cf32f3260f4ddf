"""Prologue forward and backward of the C++ provider against the torch provider, with truth in float64."""

import pytest
import torch

from mmpeft_fast.ops import kernels_cpu, kernels_torch
from mmpeft_fast.ops.kernel_set import LowRank, Mask, PrologueSpec
from tests.closeness import assert_as_close_as_eager
from tests.csrc.arrays import LAYOUTS, assert_same_set, contiguous

SHAPES = [(3, 1), (5, 7), (4, 33), (17, 130), (33, 1000), (1, 130), (0, 33)]
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


def make_spec(
    name: str, width: int, dtype: torch.dtype, *, in_scale: bool, gain_dtype=None, scale_dtype=None
) -> PrologueSpec:
    gain = contiguous(width, dtype=gain_dtype or dtype) if name == "rms_norm" else None
    return PrologueSpec(name, gain, 1e-5, contiguous(width, dtype=scale_dtype or dtype) if in_scale else None)


def make_x(name: str, shape, dtype, layout) -> tuple[torch.Tensor, ...]:
    return tuple(LAYOUTS[layout](*shape, dtype=dtype) for _ in range(2 if name == "swiglu" else 1))


def make_mask(p: float, stream: int = 1) -> Mask | None:
    return Mask(p, stream, SEED) if p else None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["none", "rms_norm", "swiglu"])
def test_forward_and_backward(name, shape, dtype, instruction_set):
    for layout, in_scale, p in (("contiguous", False, 0.0), ("strided", True, 0.1), ("strided", False, 0.5)):
        what = f"{name} {layout} scale {in_scale} p {p}"
        spec = make_spec(name, shape[1], dtype, in_scale=in_scale)
        x = make_x(name, shape, dtype, layout)
        low_rank = LowRank(contiguous(3, shape[1], dtype=torch.float32), make_mask(p))
        for part in (low_rank, None):
            h, rstd, _ = assert_same_set(
                kernels_cpu.prologue, kernels_torch.prologue, (spec, x, part), {"need_h": True}, what
            )
            assert h.shape == shape
        da = contiguous(shape[0], 3, dtype=dtype)
        residual = LAYOUTS[layout](*shape, dtype=dtype) if name != "swiglu" else None
        options = {
            "low_rank": [(low_rank, da)], "ddown_wanted": [True], "need_dx": (True,) * len(x), "need_dgain": True,
            "need_din_scale": True, "dresidual": residual,
        }  # fmt: skip
        if name != "rms_norm":
            options["need_dgain"] = False
        if spec.in_scale is None:
            options["need_din_scale"] = False
        arguments = (spec, LAYOUTS[layout](*shape, dtype=dtype), x, rstd)
        assert_same_set(kernels_cpu.prologue_backward, kernels_torch.prologue_backward, arguments, options, what)


@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16])
def test_a_gain_and_a_scale_of_another_dtype(gain_dtype, dtype):
    spec = make_spec("rms_norm", 33, dtype, in_scale=True, gain_dtype=gain_dtype, scale_dtype=torch.float32)
    x = (contiguous(5, 33, dtype=dtype),)
    _, rstd, _ = assert_same_set(kernels_cpu.prologue, kernels_torch.prologue, (spec, x, None), {}, "forward")
    result = assert_same_set(
        kernels_cpu.prologue_backward, kernels_torch.prologue_backward,
        (spec, contiguous(5, 33, dtype=dtype), x, rstd),
        {"need_dx": (True,), "need_dgain": True, "need_din_scale": True}, "backward",
    )  # fmt: skip
    assert result.dgain.dtype == gain_dtype and result.din_scale.dtype == torch.float32


def test_a_known_rstd_is_used():
    spec = make_spec("rms_norm", 40, torch.float32, in_scale=False)
    x, rstd = contiguous(6, 40, dtype=torch.float32), torch.rand(6, 1) + 0.5
    h, same, _ = kernels_cpu.prologue(spec, (x,), None, rstd=rstd)
    assert same is rstd
    assert_as_close_as_eager(h, x * rstd * spec.gain, x.double() * rstd.double() * spec.gain.double(), "h")


def test_nothing_is_computed_twice_for_an_unchanged_input():
    x = contiguous(4, 8, dtype=torch.float32)
    spec = PrologueSpec("none", None, 0.0, None)
    h, rstd, a = kernels_cpu.prologue(spec, (x,), None)
    assert h is x and rstd is None and a is None
    h, _, _ = kernels_cpu.prologue(spec, (x,), LowRank(contiguous(2, 8, dtype=torch.float32), make_mask(0.5)))
    assert h is x
    dh = contiguous(4, 8, dtype=torch.float32)
    assert kernels_cpu.prologue_backward(spec, dh, (None,), None, need_dx=(True,)).dx[0] is dh


@pytest.mark.parametrize("name", ["none", "rms_norm", "swiglu"])
@pytest.mark.parametrize("masks", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.3, 0.2), (0.2, 0.2)], ids=str)
def test_branches_on_masks_of_their_own(name, masks, dtype):
    shape = (9, 70)
    spec, x = make_spec(name, shape[1], dtype, in_scale=True), make_x(name, shape, dtype, "strided")
    _, rstd, _ = kernels_torch.prologue(spec, x, None)
    low_rank = [
        (
            LowRank(contiguous(rank, shape[1], dtype=dtype), make_mask(p, stream)),
            contiguous(shape[0], rank, dtype=dtype),
        )
        for stream, (rank, p) in enumerate(zip((2, 5, 3), masks, strict=False))
    ]
    for wanted in ([True] * len(masks), [False] * len(masks), [i % 2 == 0 for i in range(len(masks))]):
        options = {"low_rank": low_rank, "ddown_wanted": wanted, "need_dx": (True,) * len(x)}
        arguments = (spec, contiguous(*shape, dtype=dtype), x, rstd)
        assert_same_set(kernels_cpu.prologue_backward, kernels_torch.prologue_backward, arguments, options, str(wanted))
        assert_same_set(
            kernels_cpu.prologue_backward, kernels_torch.prologue_backward, (spec, None, x, rstd),
            options | {"need_dx": (False,) * len(x)}, "ddowns only",
        )  # fmt: skip


@pytest.mark.parametrize("name", ["none", "rms_norm", "swiglu"])
def test_only_what_is_asked_for(name, dtype):
    shape = (5, 33)
    spec, x = make_spec(name, shape[1], dtype, in_scale=True), make_x(name, shape, dtype, "contiguous")
    _, rstd, _ = kernels_torch.prologue(spec, x, None)
    for need_dx in ((True,), (False,)) if len(x) == 1 else ((True, False), (False, True), (False, False)):
        options = {"need_dx": need_dx, "need_dgain": name == "rms_norm", "need_din_scale": True}
        assert_same_set(
            kernels_cpu.prologue_backward, kernels_torch.prologue_backward,
            (spec, contiguous(*shape, dtype=dtype), x, rstd), options, str(need_dx),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["none", "rms_norm", "swiglu"])
def test_dx_goes_where_it_is_told(name, dtype):
    shape = (6, 33)
    spec, x = make_spec(name, shape[1], dtype, in_scale=False), make_x(name, shape, dtype, "contiguous")
    _, rstd, _ = kernels_torch.prologue(spec, x, None)
    dh = contiguous(*shape, dtype=dtype)
    expected = kernels_cpu.prologue_backward(spec, dh.clone(), x, rstd, need_dx=(True,) * len(x)).dx
    buffer = torch.full((6, 33 * len(x) + 2), 7.0, dtype=dtype)
    out = tuple(buffer[:, 1 + i * 33 : 1 + (i + 1) * 33] for i in range(len(x)))
    got = kernels_cpu.prologue_backward(spec, dh, x, rstd, need_dx=(True,) * len(x), dx_out=out).dx
    for a, b, view in zip(got, expected, out, strict=True):
        assert a.data_ptr() == view.data_ptr() and torch.equal(a, b)
    assert (buffer[:, 0] == 7).all() and (buffer[:, -1] == 7).all()


@pytest.mark.parametrize("name", ["none", "rms_norm", "swiglu"])
@pytest.mark.parametrize("in_scale", [False, True])
@pytest.mark.parametrize("p", [None, 0.0, 0.3])
def test_h_goes_where_it_is_told(name, in_scale, p, dtype):
    shape = (6, 33)
    spec, x = make_spec(name, shape[1], dtype, in_scale=in_scale), make_x(name, shape, dtype, "strided")
    low_rank = None if p is None else LowRank(contiguous(3, shape[1], dtype=dtype), make_mask(p))
    expected, _, _ = kernels_cpu.prologue(spec, x, low_rank)
    for need_h in (True, False):
        buffer = torch.full((6, 40), 7.0, dtype=dtype)
        options = {"need_h": need_h, "h_out": buffer[:, 2:35]}
        assert_same_set(kernels_cpu.prologue, kernels_torch.prologue, (spec, x, low_rank), options, f"{need_h=}")
        h, _, _ = kernels_cpu.prologue(spec, x, low_rank, **options)
        assert (h.data_ptr() == buffer[:, 2:].data_ptr()) if need_h else h is None
        assert torch.equal(buffer[:, 2:35], expected)
        assert (buffer[:, :2] == 7).all() and (buffer[:, 35:] == 7).all()


def test_inputs_are_left_alone(dtype):
    spec = make_spec("rms_norm", 33, dtype, in_scale=True)
    tensors = [contiguous(4, 33, dtype=dtype) for _ in range(2)]
    copies = [tensor.clone() for tensor in tensors]
    low_rank = LowRank(contiguous(3, 33, dtype=dtype), make_mask(0.3))
    _, rstd, a = kernels_cpu.prologue(spec, (tensors[0],), low_rank)
    kernels_cpu.prologue_backward(
        spec, torch.ones(4, 33, dtype=dtype), (tensors[0],), rstd, low_rank=[(low_rank, a)], ddown_wanted=[True],
        need_dx=(True,), dresidual=tensors[1],
    )  # fmt: skip
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))

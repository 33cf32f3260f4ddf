"""The same bits for any number of threads, and fakes whose results look like the real ones."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpeft_fast.ops import kernels_cpu
from mmpeft_fast.ops.kernel_set import HeadTransform, LowRank, Mask, PrologueSpec, Rotation
from tests.csrc.arrays import cloned, contiguous, leaves, mapped


def calls(dtype: torch.dtype) -> dict:
    """Every function of the kernel set with arguments large enough for several threads."""
    rows, width, head_dim = 300, 520, 64
    x, up, dh, residual = (contiguous(rows, width, dtype=dtype) for _ in range(4))
    low_rank = LowRank(contiguous(8, width, dtype=dtype), Mask(0.1, 0, torch.tensor(7)))
    da = contiguous(rows, 8, dtype=dtype)
    norm = PrologueSpec("rms_norm", contiguous(width, dtype=dtype), 1e-6, contiguous(width, dtype=dtype))
    swiglu, plain = PrologueSpec("swiglu", None, 0.0, norm.in_scale), PrologueSpec("none", None, 0.0, None)
    rstd = torch.rand(rows, 1) + 0.5
    q = contiguous(2, 150, 8 * head_dim, dtype=dtype)
    angles = contiguous(1, 150, head_dim, dtype=dtype)
    how = (HeadTransform(contiguous(8 * head_dim, dtype=dtype), contiguous(head_dim, dtype=dtype)),) * 2
    how = (*how, HeadTransform(how[0].scale))
    rotation = Rotation(angles, angles, angles, angles)
    heads = [contiguous(2, 150, 8, head_dim, dtype=dtype).transpose(1, 2) for _ in range(4)]
    prefix, lse = [contiguous(2, 20, head_dim, dtype=dtype) for _ in range(2)], torch.randn(2, 8, 150)
    labels = torch.randint(width, (rows,))
    backward = {"low_rank": [(low_rank, da)], "ddown_wanted": [True]}
    head_options = {"head_dim": head_dim, "eps": 1e-6}
    return {
        "rms_norm": (kernels_cpu.prologue, (norm, (x,), low_rank), {}),
        "swiglu": (kernels_cpu.prologue, (swiglu, (x, up), low_rank), {}),
        "drop": (kernels_cpu.prologue, (plain, (x,), low_rank), {"need_h": False}),
        "rms_norm backward": (
            kernels_cpu.prologue_backward, (norm, dh, (x,), rstd),
            backward | {"need_dx": (True,), "need_dgain": True, "need_din_scale": True, "dresidual": residual},
        ),
        "swiglu backward": (
            kernels_cpu.prologue_backward, (swiglu, dh, (x, up), None),
            backward | {"need_dx": (True, True), "need_din_scale": True},
        ),
        "none backward": (kernels_cpu.prologue_backward, (plain, dh, (x,), None), backward | {"need_dx": (True,)}),
        "heads": (kernels_cpu.heads, (q, q, q, how, rotation), head_options),
        "heads_backward": (
            kernels_cpu.heads_backward, (heads[:3], (q, q, q), how, rotation),
            head_options | {"needs": [(True, True, True), (True, True, True), (True, True, False)]},
        ),
        "merge_prefix": (kernels_cpu.merge_prefix, (heads[0], *prefix, heads[1], lse), {"scale": 0.1, "alive": None}),
        "prefix_backward": (
            kernels_cpu.prefix_backward, (heads[2], heads[0], *prefix, heads[1], lse, heads[3]), {"scale": 0.1},
        ),
        "cross_entropy_": (kernels_cpu.cross_entropy_, (x, labels, torch.tensor(rows)), {"need_grad": True}),
        "dy_pass": (
            kernels_cpu.dy_pass, ([x], [da], [contiguous(width, 8, dtype=dtype)]),
            {"scalings": [0.5], "activations": ["gelu"], "need_da": [True], "need_dup": [True]},
        ),
        "post_branch": (
            kernels_cpu.post_branch, (x, low_rank.down, contiguous(width, 8, dtype=dtype)),
            {"scaling": 2.0, "activation": "tanh", "mask": low_rank.mask, "residual": residual},
        ),
    }  # fmt: skip


NAMES = (
    "rms_norm", "swiglu", "drop", "rms_norm backward", "swiglu backward", "none backward", "heads", "heads_backward",
    "merge_prefix", "prefix_backward", "cross_entropy_", "dy_pass", "post_branch",
)  # fmt: skip


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def elementwise_only(name: str, arguments: tuple, options: dict) -> tuple[tuple, dict]:
    """Without the library's GEMMs, whose order of summation is not ours."""
    if "low_rank" in options:
        options = options | {"low_rank": [], "ddown_wanted": []}
    if name in ("rms_norm", "swiglu", "drop"):
        arguments = (*arguments[:2], None)
    return arguments, options


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dy_pass", "post_branch")])
def test_any_number_of_threads_gives_the_same_bits(name, dtype, threads):
    function, arguments, options = calls(dtype)[name]
    arguments, options = elementwise_only(name, arguments, options)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        given = cloned(arguments)
        results.append((*leaves(function(*given, **cloned(options))), given[0]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_fakes_look_like_the_real_results(name, dtype):
    function, arguments, options = calls(dtype)[name]
    mode = FakeTensorMode()

    def fake(x: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(x)

    real = list(leaves(function(*cloned(arguments), **cloned(options))))
    with mode:
        faked = list(leaves(function(*mapped(arguments, fake), **mapped(options, fake))))
    for a, b in zip(real, faked, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_keep_bits_under_fakes():
    mode = FakeTensorMode()
    with mode:
        keep = kernels_cpu.keep_bits(mode.from_tensor(torch.tensor(1)), 5, 9, 0.5, itemsize=4)
    assert keep.shape == (5, 9) and keep.dtype == torch.int32


def test_every_op_passes_torch_s_own_checks():
    x, h = contiguous(4, 6, dtype=torch.float32), torch.empty(4, 6)
    given = ("none", x, None, None, 0.0, None, None, torch.tensor(1), 0.5, 0, None, h, None)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mmpeft_fast_c.prologue.default, given, test_utils=tests)
    torch.library.opcheck(torch.ops.mmpeft_fast_c.activation.default, ("tanh", x, None, h), test_utils=tests)

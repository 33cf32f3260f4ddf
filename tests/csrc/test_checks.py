"""What the ops refuse, that they say why, and that nothing outside their arrays is read or written."""

import pytest
import torch

from mmpeft_fast.ops import csrc

OPS = torch.ops.mmpeft_fast_c


def prologue(x, *, name="none", up=None, gain=None, in_scale=None, rstd=None, seed=None, p=0.1, h=None, dropped=None):
    OPS.prologue(name, x, up, gain, 1e-6, in_scale, rstd, seed, p, 0, h, dropped, None)


X = torch.ones(4, 6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "layer_norm"}, "prologue: expected name none, rms_norm or swiglu, got layer_norm"),
        ({"x": torch.ones(4)}, r"prologue: expected x of sizes \[M, K\], got \[4\]"),
        ({"x": X.double()}, "prologue: expected x in Float, BFloat16 or Half, got Double"),
        ({"x": X.t()}, r"prologue: expected x with unit column stride, got strides \[1, 6\]"),
        ({"h": torch.ones(4, 5)}, r"prologue: expected h of sizes \[4, 6\], got \[4, 5\]"),
        ({"h": X.bfloat16()}, "prologue: expected h in Float, got BFloat16"),
        ({"h": torch.ones(6).expand(4, 6)}, "prologue: expected h without overlapping elements"),
        ({"h": torch.ones(9).as_strided((4, 6), (1, 1))}, "prologue: expected h without overlapping elements"),
        ({"name": "rms_norm"}, r"prologue: expected gain \[6\] for rms_norm, got none"),
        ({"name": "rms_norm", "gain": torch.ones(5)}, r"prologue: expected gain of sizes \[6\], got \[5\]"),
        ({"name": "rms_norm", "gain": torch.ones(6).int()}, "prologue: expected gain as floats on the CPU, got Int"),
        ({"name": "swiglu"}, r"prologue: expected up \[4, 6\] for swiglu, got none"),
        ({"name": "swiglu", "up": torch.ones(3, 6)}, r"prologue: expected up of sizes \[4, 6\], got \[3, 6\]"),
        ({"rstd": torch.ones(3)}, r"prologue: expected rstd of sizes \[4\], got \[3\]"),
        ({"seed": torch.tensor(1.0)}, "prologue: expected seed in Long, got Float"),
        ({"seed": torch.ones(1).long()}, r"prologue: expected seed of sizes \[\], got \[1\]"),
        ({"seed": torch.tensor(1), "p": 1.0}, "prologue: expected a dropout probability between 2"),
        ({"x": X.to_sparse()}, "prologue|SparseCPU"),
    ],
)
def test_prologue_says_what_is_wrong(options, message):
    error = ValueError if message.startswith("prologue:") else (ValueError, NotImplementedError)
    with pytest.raises(error, match=message):
        prologue(**{"x": X, **options})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": None}, "expected x where dropped or din_scale is wanted, got none"),
        ({"dgain": torch.ones(6)}, "expected dgain with rms_norm only, got it with none"),
        ({"dup": X.clone()}, "expected dup with swiglu only, got it with none"),
        ({"name": "swiglu", "up": X, "dresidual": X}, "expected dresidual with one input only, got it with swiglu"),
        ({"name": "rms_norm", "gain": torch.ones(6)}, "expected x, gain and rstd for rms_norm, got 1, 1, 0"),
        ({"din_scale": torch.ones(6).half()}, "expected din_scale in Float, got Half"),
        ({"low": torch.ones(4, 7)}, r"expected low of sizes \[4, 6\], got \[4, 7\]"),
        ({"dx": torch.ones(6, 4).t()}, "expected dx with unit column stride"),
    ],
)
def test_prologue_backward_says_what_is_wrong(change, message):
    names = (
        "name", "dh", "low", "low_factor", "seed", "p", "stream", "x", "up", "gain", "in_scale", "rstd", "dresidual",
        "dx", "dup", "dropped", "dgain", "din_scale",
    )  # fmt: skip
    given = dict.fromkeys(names) | {"name": "none", "dh": X, "low_factor": 1.0, "p": 0.0, "stream": 0, "x": X}
    given |= {"dropped": X.clone()} | change
    with pytest.raises(ValueError, match=f"prologue_backward: {message}"):
        OPS.prologue_backward(*(given[name] for name in names))


def test_the_other_ops_say_what_is_wrong():
    x = torch.ones(2, 3, 4, 6)  # [B, heads, T, DH]
    angles = torch.ones(1, 4, 6)
    prefix, lse = torch.ones(3, 2, 6), torch.ones(2, 3, 4)
    labels, count = torch.ones(4).long(), torch.tensor(1)
    cases = [
        (lambda: OPS.heads(X, None, None, 0.0, None, None, X), r"heads: expected x of sizes \[B, heads, T, DH\], got"),
        (lambda: OPS.heads(x, None, None, 0.0, angles, None, x), "heads: expected cos and sin or neither"),
        (lambda: OPS.heads(x, None, None, 0.0, angles[:, :3], angles, x), r"expected cos of sizes \[1, 4, 6\]"),
        (lambda: OPS.heads(x, None, None, 0.0, angles, angles.half(), x), "heads: expected sin in Float, got Half"),
        (lambda: OPS.heads(x[..., :5], None, None, 0.0, angles, angles, x[..., :5]), "expected an even head"),
        (lambda: OPS.heads(x, torch.ones(17), None, 0.0, None, None, x), r"heads: expected scale of sizes \[18\]"),
        (lambda: OPS.heads_backward(x, None, None, torch.ones(6), 0.0, None, None, x, None, None), "expected x where"),
        (lambda: OPS.heads_backward(x, x, None, None, 0.0, None, None, x, None, torch.ones(6)), "expected gain where"),
        (lambda: OPS.merge_prefix(x, prefix[:2], prefix, 1.0, None, x, lse), r"HK a divisor of 3, got \[2, 2, 6\]"),
        (lambda: OPS.merge_prefix(x, prefix[:, :0], prefix, 1.0, None, x, lse), r"P > 0 .*, got \[3, 0, 6\]"),
        (lambda: OPS.merge_prefix(x, prefix, prefix[:1], 1.0, None, x, lse), r"expected prefix_v of sizes \[3, 2, 6\]"),
        (lambda: OPS.merge_prefix(x, prefix, prefix, 1.0, None, x, lse.double()), "expected lse in Float on the CPU"),
        (lambda: OPS.merge_prefix(x, prefix, prefix, 1.0, lse, x, lse), "expected alive in Bool on the CPU"),
        (lambda: OPS.prefix_backward(x, x, prefix, prefix, x, lse[..., :3], 1.0, x, prefix, prefix), "expected lse of"),
        (lambda: OPS.prefix_backward(x, x, prefix, prefix, x, lse, 1.0, x, prefix[:1], prefix), "expected dprefix_k"),
        (lambda: OPS.cross_entropy(X, labels[:3], count, True, torch.ones(())), r"expected labels of sizes \[4\]"),
        (lambda: OPS.cross_entropy(X, labels, count[None], True, torch.ones(())), "expected a 0-dim count"),
        (lambda: OPS.activation("elu", X, None, X), "expected name identity, tanh, relu, gelu or silu, got elu"),
        (lambda: OPS.activation("relu", X, X[:3], X), r"expected dz of sizes \[4, 6\], got \[3, 6\]"),
        (lambda: OPS.keep_bits(torch.tensor(1), 0.5, 0, X), "expected keep in Short, Int or Long, got Float"),
    ]  # fmt: skip
    for run, message in cases:
        with pytest.raises(ValueError, match=message):
            run()


def test_tensors_elsewhere_are_refused():
    with pytest.raises(ValueError, match="prologue: expected h on the CPU, got meta"):
        torch.ops.mmpeft_fast_c.prologue.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), "none", X, None, None, 0.0, None, None, None, 0.0, 0,
            X.to("meta"), None, None,
        )  # fmt: skip


@pytest.mark.parametrize("width", [1, 7, 33, 130])
def test_nothing_is_written_beside_the_rows(width, dtype, instruction_set):
    x = torch.randn(5, width).to(dtype)
    seed = torch.tensor(3)
    for make in ("h", "dropped"):
        buffer = torch.full((7, width + 40), 7.0, dtype=dtype)
        prologue(x, seed=seed, p=0.5, **{make: buffer[1:6, 20 : 20 + width]})
        assert not (buffer[1:6, 20 : 20 + width] == 7).all()
        buffer[1:6, 20 : 20 + width] = 7
        assert (buffer == 7).all(), make


def test_unknown_instruction_sets_are_refused():
    module = csrc.extension()
    with pytest.raises(ValueError, match=r"instruction set: expected one of default.*, got sse9"):
        module.use_instruction_set("sse9")
    assert module.instruction_set() in module.instruction_sets()
    assert module.num_lanes() in (4, 8, 16)
    assert module.torch_version == torch.__version__

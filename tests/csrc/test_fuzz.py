"""Seeded fuzz of shapes, strides, offsets and non-finite values, which come out where torch has them."""

import random

import pytest
import torch

from mmpeft_fast.ops import kernels_cpu, kernels_torch
from mmpeft_fast.ops.kernel_set import HeadTransform, LowRank, Mask, PrologueSpec, Rotation
from tests.closeness import assert_as_close_as_eager
from tests.csrc.arrays import cloned, doubled, leaves, strided

NON_FINITE = (float("nan"), float("inf"), float("-inf"))


class Fuzz:
    def __init__(self, seed: int, dtype: torch.dtype):
        self.random, self.dtype = random.Random(seed), dtype
        torch.manual_seed(seed)

    def size(self, largest: int) -> int:
        return self.random.choice((1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64, 130, self.random.randint(1, largest)))

    def array(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        offset, gap = self.random.randrange(9), self.random.randrange(9)
        return strided(*shape, dtype=dtype or self.dtype, offset=offset, gap=gap)

    def poisoned(self, *shape: int) -> torch.Tensor:
        """An array of which a few elements are not finite."""
        x = self.array(*shape)
        for _ in range(self.random.randrange(3)):
            if x.numel():
                x[tuple(self.random.randrange(size) for size in shape)] = self.random.choice(NON_FINITE)
        return x


def assert_alike(cpu, plain, arguments, options, what):
    got = leaves(cpu(*cloned(arguments), **cloned(options)))
    eager = leaves(plain(*cloned(arguments), **cloned(options)))
    truth = leaves(plain(*doubled(arguments), **doubled(options)))
    for i, (a, b, c) in enumerate(zip(got, eager, truth, strict=True)):
        if a is None:
            assert b is None, f"{what}: result {i}"
            continue
        # Overflow in the narrow dtype is eager's as well as ours; whether an infinity or a nan is left may differ only
        # where a sum of both signs decides it, so the places are compared.
        assert torch.equal(a.isfinite(), b.isfinite()), f"{what}: result {i} is not finite elsewhere"
        assert torch.equal(a.isnan(), b.isnan()), f"{what}: result {i} is nan elsewhere"
        finite = b.isfinite() & c.isfinite()
        assert_as_close_as_eager(a[finite], b[finite], c[finite], f"{what}: result {i}")


@pytest.mark.parametrize("seed", range(24))
def test_prologues(seed, dtype, instruction_set):
    fuzz = Fuzz(seed, dtype)
    name = fuzz.random.choice(("none", "rms_norm", "swiglu"))
    shape = (fuzz.size(40), fuzz.size(700))
    spec = PrologueSpec(
        name,
        fuzz.array(shape[1]) if name == "rms_norm" else None,
        1e-5,
        fuzz.array(shape[1]) if fuzz.random.random() < 0.5 else None,
    )
    x = tuple(fuzz.poisoned(*shape) for _ in range(2 if name == "swiglu" else 1))
    mask = Mask(fuzz.random.choice((0.05, 0.5, 0.9)), fuzz.random.randrange(4), torch.tensor(seed))
    what = f"{name} {shape} {mask}"
    _, rstd, _ = kernels_torch.prologue(spec, x, None)
    assert_alike(kernels_cpu.prologue, kernels_torch.prologue, (spec, x, None), {"rstd": rstd}, what)
    clean = tuple(fuzz.array(*shape) for _ in x)
    low_rank = LowRank(fuzz.array(5, shape[1]), mask)
    assert_alike(kernels_cpu.prologue, kernels_torch.prologue, (spec, clean, low_rank), {}, what)
    options = {"need_dx": (True,) * len(x), "need_dgain": name == "rms_norm"}
    options["need_din_scale"] = spec.in_scale is not None and min(shape) > 1
    if name != "swiglu" and fuzz.random.random() < 0.5:
        options["dresidual"] = fuzz.poisoned(*shape)
    _, rstd, _ = kernels_torch.prologue(spec, x, None)
    assert_alike(
        kernels_cpu.prologue_backward, kernels_torch.prologue_backward, (spec, fuzz.poisoned(*shape), x, rstd),
        options, what,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_heads(seed, dtype, instruction_set):
    fuzz = Fuzz(seed, dtype)
    batch, length, heads, head_dim = (
        fuzz.size(3) % 4 + 1,
        fuzz.size(9) % 20 + 1,
        fuzz.size(4) % 5 + 1,
        2 * fuzz.size(40),
    )
    x, angles = fuzz.poisoned(batch, length, heads * head_dim), fuzz.array(1, length, head_dim)
    how = HeadTransform(
        fuzz.array(heads * head_dim) if fuzz.random.random() < 0.5 else None,
        fuzz.array(head_dim) if fuzz.random.random() < 0.5 else None,
    )
    rotation, what = Rotation(angles, angles, angles, angles), f"{(batch, length, heads, head_dim)}"
    arguments = ((x,) * 3, (how, how, HeadTransform(how.scale)), rotation)
    options = {"head_dim": head_dim, "eps": 1e-5}
    assert_alike(
        lambda raw, how, rotation, **options: kernels_cpu.heads(*raw, how, rotation, **options),
        lambda raw, how, rotation, **options: kernels_torch.heads(*raw, how, rotation, **options),
        arguments, options, what,
    )  # fmt: skip
    grad = fuzz.poisoned(batch, length, heads, head_dim).transpose(1, 2)
    options["needs"] = [(True, False, False)] * 3
    assert_alike(kernels_cpu.heads_backward, kernels_torch.heads_backward, ((grad,) * 3, *arguments), options, what)


@pytest.mark.parametrize("seed", range(12))
def test_prefixes(seed, dtype, instruction_set):
    fuzz = Fuzz(seed, dtype)
    kv_heads, groups, head_dim, num_prefix = (
        fuzz.random.choice((1, 2)),
        fuzz.random.choice((1, 3)),
        fuzz.size(70),
        fuzz.size(40),
    )
    shape = (2, fuzz.size(9) % 20 + 1, kv_heads * groups, head_dim)
    q, out, dout, dq = (fuzz.array(*shape).transpose(1, 2) for _ in range(4))
    prefix = tuple(fuzz.array(kv_heads, num_prefix, head_dim) for _ in range(2))
    lse, scale = fuzz.array(2, shape[2], shape[1], dtype=torch.float32), head_dim**-0.5
    options = {"scale": scale, "alive": None}
    assert_alike(kernels_cpu.merge_prefix, kernels_torch.merge_prefix, (q, *prefix, out, lse), options, str(shape))
    out, lse = kernels_torch.merge_prefix(q, *prefix, out, lse, **options)
    assert_alike(
        kernels_cpu.prefix_backward, kernels_torch.prefix_backward, (dout, q, *prefix, out, lse, dq), {"scale": scale},
        str(shape),
    )  # fmt: skip

"""Scale, head norm and rotation of the C++ provider against the torch provider, with truth in float64."""

import itertools

import pytest
import torch

from mmpeft_fast.ops import kernels_cpu, kernels_torch
from mmpeft_fast.ops.kernel_set import HeadTransform, Rotation
from tests.csrc.arrays import assert_same_set, contiguous, strided

EPS = 1e-6


def make_rotation(batch: int, length: int, num_queries: int, head_dim: int, dtype: torch.dtype) -> Rotation:
    angles = torch.randn(batch, length, head_dim)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return Rotation(cos, sin, cos[:, :num_queries], sin[:, :num_queries])


def make_how(width: int, head_dim: int, dtype: torch.dtype, scale: bool, gain: bool) -> HeadTransform:
    return HeadTransform(
        contiguous(width, dtype=torch.float32) if scale else None, contiguous(head_dim, dtype=dtype) if gain else None
    )


@pytest.mark.parametrize("head_dim", [2, 14, 64, 130])
@pytest.mark.parametrize("scale, gain", list(itertools.product((False, True), repeat=2)))
def test_forward_and_backward(head_dim, scale, gain, dtype, instruction_set):
    batch, length, num_queries, num_heads, kv_heads = 2, 5, 3, 3, 1
    q = strided(batch, num_queries, num_heads * head_dim, dtype=dtype)
    k, v = (strided(batch, length, kv_heads * head_dim, dtype=dtype) for _ in range(2))
    rotation = make_rotation(1 if scale else batch, length, num_queries, head_dim, torch.float32 if gain else dtype)
    how = (
        make_how(num_heads * head_dim, head_dim, dtype, scale, gain),
        make_how(kv_heads * head_dim, head_dim, dtype, scale, gain),
        make_how(kv_heads * head_dim, head_dim, dtype, scale, False),
    )
    options = {"head_dim": head_dim, "eps": EPS}
    if rotation.cos.dtype == dtype:  # torch widens the result to the angles' dtype, the provider keeps the input's
        results = assert_same_set(kernels_cpu.heads, kernels_torch.heads, (q, k, v, how, rotation), options, "forward")
        assert results[0].transpose(1, 2).is_contiguous()
    grads = (
        contiguous(batch, num_heads, num_queries, head_dim, dtype=dtype),  # as a kernel may return it
        strided(batch, length, kv_heads, head_dim, dtype=dtype).transpose(1, 2),
        strided(batch, length, kv_heads, head_dim, dtype=dtype).transpose(1, 2),
    )
    needs = [(True, scale, gain), (True, scale, gain), (True, scale, False)]
    if rotation.cos.dtype == dtype:
        assert_same_set(
            kernels_cpu.heads_backward, kernels_torch.heads_backward, (grads, (q, k, v), how, rotation),
            options | {"needs": needs}, "backward",
        )  # fmt: skip


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("num_heads", [4, 9, 17, 33])
def test_more_heads_than_a_vector_has_lanes(num_heads, scale, dtype, instruction_set):
    head_dim = 10
    x, grad = (strided(2, 3, num_heads * head_dim, dtype=dtype) for _ in range(2))
    grad = grad.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
    rotation = make_rotation(2, 3, 3, head_dim, dtype)
    how = (make_how(num_heads * head_dim, head_dim, dtype, scale, True),) * 3
    options = {"head_dim": head_dim, "eps": EPS}
    assert_same_set(kernels_cpu.heads, kernels_torch.heads, (x, x, x, how, rotation), options, "y")
    needs = [(True, scale, True)] * 3
    assert_same_set(
        kernels_cpu.heads_backward, kernels_torch.heads_backward, ((grad,) * 3, (x,) * 3, how, rotation),
        options | {"needs": needs}, "gradients",
    )  # fmt: skip


def test_wide_angles_keep_the_dtype(dtype):
    """float32 angles with a narrower x give x's dtype, as close as rotating in float32 and rounding."""
    x = contiguous(1, 4, 6, dtype=dtype)
    rotation = make_rotation(1, 4, 4, 6, torch.float32)
    how = (HeadTransform(),) * 3
    got = kernels_cpu.heads(x, x, x, how, rotation, head_dim=6, eps=EPS)
    wide = kernels_torch.heads(*(x.float(),) * 3, how, rotation, head_dim=6, eps=EPS)
    for a, b in zip(got, wide, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype))


def test_an_untouched_v_is_a_view():
    x = contiguous(2, 3, 8, dtype=torch.float32)
    rotation = make_rotation(2, 3, 3, 4, torch.float32)
    *_, v = kernels_cpu.heads(x, x, x, (HeadTransform(),) * 3, rotation, head_dim=4, eps=EPS)
    assert v.data_ptr() == x.data_ptr() and v.shape == (2, 2, 3, 4)


@pytest.mark.parametrize("with_out", [False, True])
def test_only_what_is_asked_for(with_out, dtype):
    head_dim, x = 6, contiguous(1, 4, 12, dtype=dtype)
    rotation = make_rotation(1, 4, 4, head_dim, dtype)
    how = make_how(12, head_dim, dtype, True, True)
    grad = contiguous(1, 2, 4, head_dim, dtype=dtype)
    buffer = torch.full((1, 4, 40), 7.0, dtype=dtype)
    for needs in itertools.product((False, True), repeat=3):
        out = tuple(buffer[..., 1 + 13 * i : 13 + 13 * i] for i in range(3)) if with_out else None
        options = {"head_dim": head_dim, "eps": EPS, "needs": [needs, needs, (*needs[:2], False)], "out": out}
        arguments = ((grad,) * 3, (x,) * 3, (how, how, HeadTransform(how.scale)), rotation)
        assert_same_set(kernels_cpu.heads_backward, kernels_torch.heads_backward, arguments, options, str(needs))
        if with_out and needs[0]:
            results = kernels_cpu.heads_backward(*arguments, **options)
            assert all(dx.data_ptr() == view.data_ptr() for (dx, _, _), view in zip(results, out, strict=True))
            assert (buffer[..., ::13] == 7).all()


def test_raw_inputs_may_be_missing_where_nothing_needs_them(dtype):
    head_dim = 6
    rotation = make_rotation(1, 4, 4, head_dim, dtype)
    grad = contiguous(1, 2, 4, head_dim, dtype=dtype)
    how = (HeadTransform(contiguous(12, dtype=dtype)),) * 3
    options = {"head_dim": head_dim, "eps": EPS, "needs": [(True, False, False)] * 3}
    arguments = ((grad,) * 3, (None,) * 3, how, rotation)
    truth_raw = ((grad,) * 3, (contiguous(1, 4, 12, dtype=dtype),) * 3, how, rotation)
    got = kernels_cpu.heads_backward(*arguments, **options)
    expected = kernels_cpu.heads_backward(*truth_raw, **options)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, expected, strict=True))

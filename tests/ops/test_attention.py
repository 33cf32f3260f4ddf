"""Attention over raw projections against its definition by concatenation."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpeft_fast.measure import saved_bytes
from mmpeft_fast.ops.attention import HeadTransform, attention, attention_ref
from mmpeft_fast.ops.rotary import rotary_cos_sin
from tests.closeness import assert_as_close_as_eager, assert_exact

HEAD_DIM = 8


def make(
    *, heads=4, kv_heads=2, length=7, prefix=3, scales=False, norms=False, mask=None, rows=False, dtype=torch.float64
):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    batch = 2
    cos, sin = rotary_cos_sin(torch.arange(length)[None], torch.rand(HEAD_DIM // 2, generator=generator), dtype=dtype)
    q, k, v = (random(batch, length, n * HEAD_DIM) for n in (heads, kv_heads, kv_heads))
    rows = torch.tensor([[1, 4, 6], [0, 2, 5]]) if rows else None
    full = None
    if mask is not None:
        padding = torch.ones(batch, length, dtype=torch.bool)
        padding[0, slice(0, 2) if mask == "left" else slice(length - 2, length)] = False
        full = torch.ones(length, length, dtype=torch.bool).tril() & padding[:, None, None, :]
    options = {
        "head_dim": HEAD_DIM,
        "mask": full,
        "rows": rows,
        "q_how": HeadTransform(random(heads * HEAD_DIM) if scales else None, random(HEAD_DIM) if norms else None),
        "k_how": HeadTransform(random(kv_heads * HEAD_DIM) if scales else None, random(HEAD_DIM) if norms else None),
        "v_scale": random(kv_heads * HEAD_DIM) if scales else None,
        "prefix": (random(kv_heads, prefix, HEAD_DIM), random(kv_heads, prefix, HEAD_DIM)) if prefix else None,
    }
    extra = [*options["q_how"], *options["k_how"], options["v_scale"], *(options["prefix"] or ())]
    return (q, k, v, cos, sin), options, [q, k, v, *(tensor for tensor in extra if tensor is not None)]


def run(function, inputs, options, tensors):
    q, k, v, cos, sin = inputs
    if options["rows"] is not None:
        q = torch.take_along_dim(q, options["rows"][..., None], dim=1)
    out = function(q, k, v, cos, sin, **options)
    upstream = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, torch.autograd.grad(out, tensors, upstream)


def widened(case):
    """The same case in float64."""
    inputs, options, tensors = case
    wide = {id(tensor): tensor.detach().double().requires_grad_() for tensor in tensors}

    def of(value):
        if isinstance(value, HeadTransform):
            return HeadTransform(*(of(part) for part in value))
        if isinstance(value, tuple):
            return tuple(of(part) for part in value)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return wide.get(id(value), value.double())
        return value

    return of(inputs), {name: of(value) for name, value in options.items()}, [wide[id(tensor)] for tensor in tensors]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("mask", [None, "left", "right"])
def test_equals_concatenation_in_float64(heads, mask):
    for prefix, scales, norms, rows in itertools.product([0, 3], [False, True], [False, True], [False, True]):
        case = make(heads=heads[0], kv_heads=heads[1], prefix=prefix, scales=scales, norms=norms, mask=mask, rows=rows)
        out, grads = run(attention, *case)
        truth, true_grads = run(attention_ref, *case)
        assert_exact(out, truth, f"{prefix} {scales} {norms} {rows}")
        for i, (grad, expected) in enumerate(zip(grads, true_grads, strict=True)):
            assert_exact(grad, expected, f"{prefix} {scales} {norms} {rows} gradient {i}")


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("scales", [False, True])
def test_gradcheck(prefix, scales):
    inputs, options, tensors = make(length=4, prefix=prefix, scales=scales, norms=True)

    def function(q, k, v, *extra):
        extra = iter(extra)
        options["q_how"] = HeadTransform(next(extra) if scales else None, next(extra))
        options["k_how"] = HeadTransform(next(extra) if scales else None, next(extra))
        options["v_scale"] = next(extra) if scales else None
        options["prefix"] = (next(extra), next(extra)) if prefix else None
        return attention(q, k, v, *inputs[3:], **options)

    assert torch.autograd.gradcheck(function, tuple(tensors), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length, prefix", [(1, 7), (33, 1), (130, 20)])
def test_training_dtypes(dtype, length, prefix):
    case = make(length=length, prefix=prefix, scales=True, dtype=dtype)
    out, grads = run(attention, *case)
    eager, eager_grads = run(attention_ref, *case)
    truth, true_grads = run(attention_ref, *widened(case))
    assert_as_close_as_eager(out, eager, truth, "out")
    for i, (grad, eager_grad, expected) in enumerate(zip(grads, eager_grads, true_grads, strict=True)):
        assert_as_close_as_eager(grad, eager_grad, expected, f"gradient {i}")


def test_prefix_is_seen_by_queries_that_may_attend_to_nothing_else():
    inputs, options, tensors = make(mask="left")
    out, _ = run(attention, inputs, options, tensors)
    assert not out.isnan().any()
    without, _ = run(attention, *make(mask="left", prefix=0))
    assert without[0, :2].abs().sum() == 0 and out[0, :2].abs().sum() > 0


def test_gradient_of_a_scale_is_exact_at_zero():
    inputs, options, tensors = make(scales=True)
    options["v_scale"].data.zero_()
    _, grads = run(attention, inputs, options, tensors)
    _, truth = run(attention_ref, inputs, options, tensors)
    index = next(i for i, tensor in enumerate(tensors) if tensor is options["v_scale"])
    assert grads[index].abs().sum() > 0
    assert_exact(grads[index], truth[index])


def test_scales_and_prefix_save_nothing_of_the_size_of_keys():
    def measure(**kwargs):
        inputs, options, tensors = make(length=64, **kwargs)
        with saved_bytes() as saved:
            attention(*inputs, **options)
        own = sum(tensor.numel() * tensor.element_size() for tensor in tensors[3:])
        return saved.bytes - own

    assert measure(prefix=3, scales=True, norms=True) == measure(prefix=0)


def test_frozen_parts_get_no_gradient_and_the_rest_is_unchanged():
    inputs, options, tensors = make(scales=True, norms=True)
    _, together = run(attention, inputs, options, tensors)
    for i, tensor in enumerate(tensors):
        for other in tensors:
            other.requires_grad_(other is tensor)
        _, (alone,) = run(attention, inputs, options, [tensor])
        assert_exact(alone, together[i], f"tensor {i}")


def test_under_fake_tensors():
    with FakeTensorMode():
        q, k = (
            torch.empty(2, 9, 64, dtype=torch.bfloat16, requires_grad=True),
            torch.empty(2, 9, 32, dtype=torch.bfloat16),
        )
        cos = torch.empty(1, 9, 16, dtype=torch.bfloat16)
        prefix = torch.empty(2, 5, 16, requires_grad=True)
        attention(q, k, k, cos, cos, head_dim=16, prefix=(prefix, prefix)).sum().backward()
        assert prefix.grad.shape == (2, 5, 16)


def test_errors():
    q, k, cos = torch.randn(1, 3, 32), torch.randn(1, 3, 16), torch.ones(1, 3, 16)
    with pytest.raises(ValueError, match=r"HK dividing H, got q \[1, 3, 24\]"):
        attention(q[..., :24], k, k, cos, cos, head_dim=16)
    with pytest.raises(ValueError, match=r"expected prefix keys and values \[1, P, 16\], got \[\[2, 4, 16\]"):
        attention(q, k, k, cos, cos, head_dim=16, prefix=(torch.ones(2, 4, 16), torch.ones(2, 4, 16)))
    with pytest.raises(ValueError, match="expected 3 query positions"):
        attention(q[:, :2], k, k, cos, cos, head_dim=16)

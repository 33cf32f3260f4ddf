"""Cross-entropy of rows of logits in C++ against the torch provider, with truth in float64."""

import pytest
import torch

from mmpeft_fast.ops import kernels_cpu, kernels_torch, providers
from mmpeft_fast.ops.attention import attention
from mmpeft_fast.ops.cross_entropy import linear_cross_entropy
from tests.closeness import assert_as_close_as_eager
from tests.csrc.arrays import LAYOUTS, cloned, doubled


def run(function, logits, labels, count, need_grad=True):
    loss = function(logits, labels, count, need_grad=need_grad)
    return loss, logits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 33), (2, 130), (4, 5000)], ids=str)
def test_loss_and_gradient(shape, layout, dtype, instruction_set):
    logits = LAYOUTS[layout](*shape, dtype=dtype) * 4
    labels = torch.randint(shape[1], shape[:1])
    labels[1::3] = -100
    for count in (torch.tensor(shape[0]), torch.tensor(2.5)):
        results = {}
        for name, function, given in (
            ("cpu", kernels_cpu.cross_entropy_, cloned(logits)),
            ("eager", kernels_torch.cross_entropy_, cloned(logits)),
            ("truth", kernels_torch.cross_entropy_, doubled(logits)),
        ):
            results[name] = run(function, given, labels, count)
        for i, what in enumerate(("loss", "gradient")):
            assert_as_close_as_eager(*(results[name][i] for name in ("cpu", "eager", "truth")), what)
        assert results["cpu"][0].dtype == torch.float32 and results["cpu"][0].shape == ()


def test_without_gradient_the_logits_stay(dtype):
    logits = LAYOUTS["contiguous"](4, 33, dtype=dtype)
    before, labels = logits.clone(), torch.tensor([0, 32, -100, 5])
    loss = kernels_cpu.cross_entropy_(logits, labels, torch.tensor(3), need_grad=False)
    assert torch.equal(logits, before)
    assert torch.equal(loss, kernels_cpu.cross_entropy_(logits, labels, torch.tensor(3), need_grad=True))


def test_no_rows_and_no_labels_are_torch_s_nan_and_no_gradient(dtype):
    empty = torch.empty(0, 5, dtype=dtype)
    none = torch.empty(0, dtype=torch.int64)
    assert kernels_cpu.cross_entropy_(empty, none, torch.tensor(0), need_grad=True).isnan()
    assert kernels_cpu.cross_entropy_(empty, none, torch.tensor(2), need_grad=True) == 0
    logits = torch.randn(2, 5).to(dtype)
    assert kernels_cpu.cross_entropy_(logits, torch.tensor([-100, -100]), torch.tensor(0), need_grad=True).isnan()
    assert not logits.any()


@pytest.mark.parametrize("label", [5, -1, -101, 2**40])
def test_labels_out_of_range_raise(label):
    logits = torch.randn(2, 5)
    with pytest.raises(ValueError, match=rf"cross_entropy: expected labels in \[0, 5\) or -100, got {label} in row 1"):
        kernels_cpu.cross_entropy_(logits, torch.tensor([0, label]), torch.tensor(2), need_grad=True)


@pytest.mark.parametrize("width", [5, 2100])
def test_non_finite_logits_as_torch(width, dtype, instruction_set):
    rows = torch.randn(6, width)
    for row, value in enumerate((float("inf"), float("-inf"), float("nan"))):
        rows[row, width // 2] = value
        rows[row + 3, -1] = value
    rows[4] = float("-inf")
    logits, labels = rows.to(dtype), torch.zeros(6, dtype=torch.int64)
    expected = logits.clone()
    for row in range(6):
        single = [each[row : row + 1] for each in (logits, expected)]
        losses = [
            function(each, labels[:1], torch.tensor(1), need_grad=True)
            for function, each in zip((kernels_cpu.cross_entropy_, kernels_torch.cross_entropy_), single, strict=True)
        ]
        torch.testing.assert_close(*losses, equal_nan=True, msg=f"row {row}")
    assert torch.equal(logits.isnan(), expected.isnan())


@pytest.mark.parametrize("provider", ["torch", "cpu"])
@pytest.mark.parametrize("count", [None, 0])
def test_no_labelled_row_gives_zero_gradients(provider, count, instruction_set):
    """As torch's own mean over nothing: the loss is nan, the gradients are zero."""
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((5, 8), (33, 8), (33,))]
    labels = torch.full((5,), -100)
    with providers.provider(provider):
        loss = linear_cross_entropy(*tensors[:2], labels, bias=tensors[2], count=count)
    assert loss.isnan()
    for grad in torch.autograd.grad(loss, tensors):
        assert not grad.any()
    unfused = torch.nn.functional.cross_entropy(torch.nn.functional.linear(*tensors), labels)
    assert unfused.isnan() and not any(grad.any() for grad in torch.autograd.grad(unfused, tensors))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.ones(4).long()}, r"labels \[S\], got x \[5, 8\], weight \[33, 8\], labels \[4\]"),
        ({"labels": torch.ones(5)}, "expected labels in torch.int64, got torch.float32"),
        ({"bias": torch.ones(32)}, r"a bias of as many, got weight \[33, 8\], bias \[32\]"),
        ({"weight": torch.ones(0, 8)}, r"a head of at least one word .*, got weight \[0, 8\]"),
        ({"count": torch.ones(2)}, r"expected one count, got a tensor of sizes \[2\]"),
    ],
)
def test_sizes_are_not_trusted(change, message):
    given = {"x": torch.ones(5, 8), "weight": torch.ones(33, 8), "labels": torch.ones(5).long()} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(given.pop("x"), given.pop("weight"), given.pop("labels"), **given)


@pytest.mark.parametrize("queries, keys", [(0, 4), (0, 0)])
def test_attention_without_queries(queries, keys):
    """torch's own CPU kernel divides by the number of queries, which ends the process."""
    q = torch.randn(2, queries, 16, requires_grad=True)
    k, v = (torch.randn(2, keys, 16, requires_grad=True) for _ in range(2))
    angles = torch.ones(1, keys, 8)
    rows = torch.zeros(2, queries, dtype=torch.int64) if queries != keys else None
    out = attention(q, k, v, angles, angles, head_dim=8, rows=rows)
    assert out.shape == q.shape
    for grad, like in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == like.shape and not grad.any()

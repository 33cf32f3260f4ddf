"""Packed documents and shared contexts: parts merged by log-sum-exp against a dense mask on the unfused model."""

import copy
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from mmpeft_fast import METHODS, Documents, LoRA, add_peft, compare, fuse, fuse_report, make_method
from mmpeft_fast.documents import not_targets
from mmpeft_fast.ops import documents_attention, flash
from mmpeft_fast.ops.attention import attention, attention_ref
from mmpeft_fast.ops.documents_attention import documents_backward, documents_forward
from mmpeft_fast.small_batches import documents_batch
from tests.closeness import assert_as_close_as_eager
from tests.tiny_models import VOCABULARY, randomize_trainable, small_settings, tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "llava", "qwen2_vl")
TREE = Documents(
    (((9, -1), (4, 0), (3, 1), (5, 0), (6, -1)), ((7, -1), (6, 0), (0, 0), (4, 0), (1, -1)), ((5, -1),), ())
)


def random_documents(seed: int, rows: int = 3) -> tuple[Documents, int]:
    """Trees of depth up to 3 with documents of 0 to 6 tokens, and a length that leaves padding."""
    rng = random.Random(seed)

    def tree(row, parent, depth):
        row.append((rng.choice((0, 1, 1, 2, 3, 6)), parent))
        index = len(row) - 1
        for _ in range(rng.randrange(4) if depth < 3 else 0):
            tree(row, index, depth + 1)

    made = []
    for _ in range(rows):
        row: list[tuple[int, int]] = []
        for _ in range(rng.randrange(1, 4)):
            tree(row, -1, 0)
        made.append(tuple(row))
    documents = Documents(tuple(made))
    return documents, max(documents.lengths) + rng.randrange(3)


def reference_mask(documents: Documents, length: int) -> torch.Tensor:
    """By definition, token by token."""
    mask = torch.zeros(len(documents.rows), 1, length, length, dtype=torch.bool)
    for row_idx, row in enumerate(documents.rows):
        of = [index for index, (size, _) in enumerate(row) for _ in range(size)]
        for i, mine in enumerate(of):
            above, document = {mine}, mine
            while row[document][1] >= 0:
                document = row[document][1]
                above.add(document)
            for j, other in enumerate(of):
                mask[row_idx, 0, i, j] = other in above and (other != mine or j <= i)
        for i in range(len(of), length):
            mask[row_idx, 0, i, i] = True
    return mask


def positions_of(documents: Documents, length: int) -> torch.Tensor:
    positions = torch.zeros(len(documents.rows), length, dtype=torch.long)
    for row_idx, row in enumerate(documents.rows):
        ends, start = [], 0
        for size, parent in row:
            first = 0 if parent < 0 else ends[parent]
            positions[row_idx, start : start + size] = torch.arange(first, first + size)
            ends.append(first + size)
            start += size
    return positions


def batch_of(documents: Documents, length: int, share: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens; every `share`-th one that may carry a label does."""
    generator = torch.Generator().manual_seed(0)
    # The same tokens whatever special ones families add: how exact transformers' float32 norms are hangs on them.
    ids = torch.randint(20, VOCABULARY, (len(documents.rows), length), generator=generator)
    labels = torch.full_like(ids, -100)
    for row, used in enumerate(documents.lengths):
        labels[row, 1:used:share] = ids[row, 1:used:share]
    labels.masked_fill_(not_targets(documents, length, labels.device), -100)
    positions = documents.position_ids(length)
    assert torch.equal(positions, positions_of(documents, length))
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("seed", range(12))
def test_masks_are_those_of_the_definition(seed):
    documents, length = random_documents(seed)
    mask = reference_mask(documents, length)
    assert torch.equal(documents.mask(length), mask)
    rows = torch.randint(0, length, (3, 4), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(
        documents.mask_of(rows, length), mask[:, 0].gather(1, rows[..., None].expand(-1, -1, length))[:, None]
    )


def test_levels_have_queries_of_their_own():
    for seed in range(20):
        documents, length = random_documents(seed)
        for spans in documents.levels:
            taken = [(span.row, query) for span in spans for query in range(span.start, span.stop)]
            assert len(taken) == len(set(taken))
        pairs = torch.zeros(3, 1, length, length, dtype=torch.long)
        for number, spans in enumerate(documents.levels):
            for row, start, stop, first, last in spans:
                ones = torch.ones(stop - start, last - first, dtype=torch.long)
                pairs[row, 0, start:stop, first:last] += ones if number else ones.tril()
        for row, used in enumerate(documents.lengths):
            assert torch.equal(pairs[row, 0, :used], reference_mask(documents, length)[row, 0, :used].long())


def operands(documents, length, dtype, *, prefix=False):
    generator = torch.Generator().manual_seed(1)

    def make(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    batch = len(documents.rows)
    q, k, v = make(batch, length, 32), make(batch, length, 16), make(batch, length, 16)
    cos, sin = (torch.rand(1, length, 8, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return (q, k, v), (cos, sin), (make(2, 3, 8), make(2, 3, 8)) if prefix else None


def gradients(function, inputs, angles, prefix, upstream, **options):
    out = function(*inputs, *angles, head_dim=8, prefix=prefix, **options)
    return [out, *torch.autograd.grad(out, [*inputs, *(prefix or ())], upstream.to(out.dtype))]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_attention(seed, dtype, prefix):
    documents, length = random_documents(seed)
    real = torch.zeros(3, length, 1, dtype=torch.float64)
    for row, used in enumerate(documents.lengths):
        real[row, :used] = 1
    upstream = torch.randn(3, length, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * real
    inputs = operands(documents, length, dtype, prefix=prefix)
    got = gradients(attention, *inputs, upstream, documents=documents)
    mask = documents.mask(length)
    eager = gradients(attention_ref, *inputs, upstream, mask=mask)
    double = [None if part is None else tuple(x.detach().double().requires_grad_() for x in part) for part in inputs]
    truth = gradients(attention_ref, *double, upstream, mask=mask)
    got[0], eager[0], truth[0] = (part[0] * real.to(part[0].dtype) for part in (got, eager, truth))
    for index, (mine, theirs, exact) in enumerate(zip(got, eager, truth, strict=True)):
        assert_as_close_as_eager(mine, theirs, exact, f"output {index}")


def test_gradcheck():
    documents = Documents((((2, -1), (2, 0), (1, 1), (2, 0)),))
    (q, k, v), angles, _ = operands(documents, 7, torch.float64)

    def function(q, k, v):
        return attention(q, k, v, *angles, head_dim=8, documents=documents)

    assert torch.autograd.gradcheck(function, (q, k, v))


def assert_same(fused, loss, model, expected):
    """Loss and gradients in float64, but for transformers' rotations and loss in float32."""
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=1e-6)
    for (name, mine), theirs in zip(fused.named_parameters(), model.parameters(), strict=True):
        if theirs.grad is not None:
            allowed = 2e-5 * theirs.grad.abs().max().item() + 1e-12
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-5, atol=allowed, msg=name)


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("family", FAMILIES)
def test_models(family, method, monkeypatch):
    """Loss and every gradient against a dense mask on the unfused model; no mask is made for the fused one but for the
    few rows of the last layer."""
    model = add_peft(tiny_model(family).train(), make_method(method, **small_settings(method)))
    randomize_trainable(model)
    model = model.double()
    fused = fuse(copy.deepcopy(model))
    assert not fuse_report(fused).kept
    batch = batch_of(TREE, 29)
    monkeypatch.setattr(Documents, "mask", lambda *_: pytest.fail("a dense mask was made"))
    loss = fused(**batch, documents=TREE).loss
    loss.backward()
    monkeypatch.undo()
    expected = model(**batch, attention_mask=TREE.mask(29), use_cache=False).loss
    expected.backward()
    assert_same(fused, loss, model, expected)


@pytest.mark.parametrize("how", ["checkpointing", "keep_logits", "unfused layer", "eager attention", "compiled"])
def test_other_ways(how):
    model = add_peft(tiny_model("llama").train(), LoRA(r=4, dropout=0.0))
    randomize_trainable(model)
    model, batch = model.double(), batch_of(TREE, 29)
    expected = model(**batch, attention_mask=TREE.mask(29), use_cache=False).loss
    expected.backward()
    fused = copy.deepcopy(model)
    fused.zero_grad(set_to_none=True)
    if how == "eager attention":
        fused.set_attn_implementation("eager")
        fused.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    if how == "unfused layer":
        fused.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    fuse(fused, keep_logits=how == "keep_logits")
    if how == "checkpointing":
        fused.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    run = torch.compile(fused, backend="aot_eager") if how == "compiled" else fused
    loss = run(**batch, documents=TREE).loss
    loss.backward()
    assert_same(fused, loss, model, expected)


def test_a_layer_that_cannot_run_fused_at_a_call_takes_the_mask():
    model = add_peft(tiny_model("llama").train(), LoRA(r=4, dropout=0.0))
    batch = batch_of(TREE, 29)
    expected = model(**batch, attention_mask=TREE.mask(29), use_cache=False).loss
    fused = fuse(copy.deepcopy(model))
    fused.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(fused(**batch, documents=TREE).loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rows, message",
    [
        ((((3, 0),),), "parent to be one before it or -1, got 0"),
        ((((3, -1), (2, 5)),), "parent to be one before it or -1, got 5"),
        ((((-3, -1),),), "lengths of at least 0, got -3"),
        ((((3, -1), (2, -1), (2, 0)),), "document 2 to follow what is below its parent 0 directly"),
    ],
)
def test_trees_that_are_none(rows, message):
    with pytest.raises(ValueError, match=message):
        Documents(rows)


def test_calls_that_are_refused():
    model = fuse(add_peft(tiny_model("llama").train(), LoRA(r=4)))
    batch = batch_of(TREE, 29)

    def refused(message, documents=TREE, **changes):
        with pytest.raises(ValueError, match=message):
            model(**{**batch, **changes}, documents=documents)

    refused("position_ids, which begin anew", position_ids=None)
    refused("a call without a cache", use_cache=True)
    refused("mmpeft_fast.Documents, got tuple", documents=TREE.rows)
    refused("4 rows of at most 29 tokens, got 1 rows", documents=Documents((((5, -1),),)))
    labels = batch["labels"].clone()
    labels[0, 3] = 5
    where = "not on a document's first token nor on what several documents share, got one at row 0, position"
    refused(f"{where} 3", labels=labels)
    labels = batch["labels"].clone()
    labels[0, 16] = 5
    refused(f"{where} 16", labels=labels)
    window = tiny_model("mistral").train()
    window.config.sliding_window = 8
    with pytest.raises(ValueError, match="the decoder's window slides"):
        fuse(window)(**batch, documents=TREE)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_verified(family, monkeypatch):
    """`compare` on a small row of documents: no difference, and a wrong merge is one."""
    model = add_peft(tiny_model(family), LoRA(r=4))
    randomize_trainable(model)
    fuse(model)
    batch = documents_batch(model.config)
    assert not compare(model, batch).differing
    right = documents_attention._merge_into
    monkeypatch.setattr(documents_attention, "_merge_into", lambda out, lse, *part: right(out, lse + 0.1, *part))
    assert compare(model, batch).differing


class TestOnAGpu:
    """The variable-length calls, with a stand-in for the library's kernel; their number on meta tensors."""

    @staticmethod
    def _forward(q, k, v, starts_q, starts_k, most_q, most_k, dropout, causal, debug, *, scale):
        """As torch's: q [total, H, DH]; out like q, lse [H, total]."""
        out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])
        for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
            assert b - a <= most_q and d - c <= most_k
            parts = [x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]
            part = flash.flash_forward(*parts, None, causal, scale)
            out[a:b], lse[:, a:b] = part.out[0].transpose(0, 1), part.lse[0]
        return out, lse, torch.zeros(2), torch.zeros(()), torch.zeros(0)

    @staticmethod
    def _backward(dout, q, k, v, out, lse, starts_q, starts_k, most_q, most_k, dropout, causal, seed, unused, *, scale):
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for (a, b), (c, d) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
            dout_part, q_part, k_part, v_part, out_part = (
                x.transpose(0, 1)[None] for x in (dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b])
            )
            result = flash.FlashResult(out_part, lse[None, :, a:b].contiguous(), ())
            found = flash.flash_backward(dout_part, q_part, k_part, v_part, result, None, causal, scale)
            for grad, part, (start, stop) in zip(grads, found, ((a, b), (c, d), (c, d)), strict=True):
                grad[start:stop] = part[0].transpose(0, 1)
        return grads

    @pytest.mark.parametrize("seed", range(6))
    def test_they_are_the_spans(self, seed, monkeypatch):
        documents, length = random_documents(seed)
        stand_in = SimpleNamespace(_flash_attention_forward=self._forward, _flash_attention_backward=self._backward)
        monkeypatch.setattr(documents_attention, "_aten", stand_in)
        generator = torch.Generator().manual_seed(seed)
        q, dout = (torch.randn(3, 4, length, 8, generator=generator) for _ in range(2))
        k, v = (torch.randn(3, 2, length, 8, generator=generator) for _ in range(2))
        for row, used in enumerate(documents.lengths):
            dout[row, :, used:] = 0
        expected = documents_forward(q, k, v, documents, 0.3)
        got = documents_attention._varlen_forward(q, k, v, documents, 0.3)
        grads = documents_backward(dout, q, k, v, expected, documents, 0.3)
        got_grads = documents_backward(dout, q, k, v, got, documents, 0.3)
        for row, used in enumerate(documents.lengths):
            torch.testing.assert_close(got.out[row, :, :used], expected.out[row, :, :used])
            torch.testing.assert_close(got.lse[row, :, :used], expected.lse[row, :, :used])
        for mine, theirs in zip(got_grads, grads, strict=True):
            for row, used in enumerate(documents.lengths):
                torch.testing.assert_close(mine[row, :, :used], theirs[row, :, :used])

    def test_their_number_does_not_grow_with_the_documents(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        class Calls(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        counts = []
        for answers in (2, 50):
            documents = Documents((((600, -1), *((30, 0),) * answers),))
            length, names = sum(documents.lengths), []
            q, k, v = (torch.empty(1, 8, length, 64, dtype=torch.bfloat16, device="meta") for _ in range(3))
            documents_attention._tables(documents, length, q.device)
            with Calls():
                result = documents_forward(q, k, v, documents, 0.125)
                documents_backward(result.out, q, k, v, result, documents, 0.125)
            assert names.count("_flash_attention_forward") == names.count("_flash_attention_backward") == 2
            counts.append(len(names))
        assert counts[0] == counts[1] < 90

"""Rows that begin alike: their tree by definition, and a fused model that computes it against the unfused one."""

import copy
import random

import pytest
import torch
from torch import nn

from mmpeft_fast import METHODS, LoRA, add_peft, fuse, fuse_report, make_method, shared_rows, unfuse
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.layers.class_swap import is_swapped
from tests.closeness import assert_same_in_double
from tests.tiny_models import (
    VOCABULARY,
    first_text_token,
    judged_together,
    randomize_trainable,
    small_settings,
    tiny_batch,
    tiny_model,
)


def random_rows(rng: random.Random) -> list[list[int]]:
    rows: list[list[int]] = []
    for _ in range(rng.randrange(1, 7)):
        start = rng.choice(rows) if rows and rng.random() < 0.7 else []
        rows.append(start[: rng.randrange(len(start) + 1)] + [rng.randrange(4) for _ in range(rng.randrange(9))])
    return rows


def padded(rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows)) + 1
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row, dtype=torch.long), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_token_sees_its_own_row(side):
    rng, num_shared = random.Random(0), 0
    for _ in range(200):
        rows = random_rows(rng)
        ids, mask = padded(rows, side)
        shared = shared_rows(ids, mask, least=rng.choice((1, 2, 4)))
        if shared is None:
            continue
        num_shared += 1
        length = shared.input_ids.shape[1]
        assert length < sum(map(len, rows))
        assert torch.equal(shared.spread(shared.input_ids[..., None].float())[..., 0].long(), ids * mask)
        sees = shared.documents.mask(length)[0, 0]
        for index, row in enumerate(rows):
            places = shared.places[index][mask[index].bool()]
            assert torch.equal(shared.position_ids[0, places], torch.arange(len(row)))
            assert torch.equal(sees[places][:, places], torch.ones(len(row), len(row)).tril().bool())
            assert torch.equal(sees[places].sum(1), torch.arange(1, len(row) + 1))
    assert num_shared > 100


def test_what_is_alike_but_for_the_image_is_not_shared():
    ids = torch.tensor([[1, 9, 9, 2, 3], [1, 9, 9, 2, 4], [1, 9, 9, 2, 5]])
    shared = shared_rows(ids, image_token=9, images=[0, 0, 2], least=3)
    assert shared.images == (0, 2)
    assert shared.documents.rows == (((4, -1), (1, 0), (1, 0), (5, -1)),)
    assert shared_rows(ids, image_token=9, images=[0, 1, 2], least=1).images == (0, 1, 2)  # token 1 alone
    assert shared_rows(ids, image_token=9, images=[0, 1, 2], least=2) is None
    parted = torch.tensor([[1, 9, 9, 2], [1, 9, 3, 4]])
    assert shared_rows(parted, image_token=9, images=[0, 0], least=2) is None


def test_bad_rows():
    with pytest.raises(ValueError, match=r"expected input_ids \[B, T\], and a mask of that shape or none, got"):
        shared_rows(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4))
    with pytest.raises(ValueError, match="padding on one side of a row, got some between tokens"):
        shared_rows(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match="an image for each of 1 rows with image tokens, got 2"):
        shared_rows(torch.tensor([[5, 1]]), image_token=5, images=[0, 1])


def pairs(family: str, side: str) -> dict[str, torch.Tensor]:
    """Two answers to each of two prompts, as rows in the order of TRL: chosen, then rejected."""
    one = tiny_batch(family, padding_side=None)
    keep = {"input_ids", "pixel_values", "image_sizes", "image_grid_thw", "mm_token_type_ids"}
    batch = {name: torch.cat((value, value)) for name, value in one.items() if name in keep}
    ids = batch["input_ids"]
    generator = torch.Generator().manual_seed(1)
    answers = torch.randint(first_text_token(), VOCABULARY, (len(ids), 7), generator=generator)
    ids = torch.cat((ids, answers), dim=1)
    mask = torch.ones_like(ids)
    mask[0, -3:] = mask[-1, -2:] = 0
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
    labels[:, :-7] = IGNORE_INDEX
    batch |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
    token_wise = ["input_ids", "attention_mask", "labels"]
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = nn.functional.pad(batch["mm_token_type_ids"], (0, answers.shape[1]))
        token_wise.append("mm_token_type_ids")
    if side == "left":
        for row, count in enumerate((~mask.bool()).sum(1).tolist()):
            for name in token_wise:
                batch[name][row] = batch[name][row].roll(count)
    return batch


def in_double(batch: dict) -> dict:
    return {name: each.double() if each.is_floating_point() else each for name, each in batch.items()}


def log_probs(model: nn.Module, batch: dict) -> torch.Tensor:
    """[B] of the labelled tokens, by the model below the head, as a preference loss takes them."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[:, :-1]).log_softmax(-1)
    targets = batch["labels"][:, 1:]
    found = logits.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    return (found * (targets != IGNORE_INDEX)).sum(1)


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return judged_together({name: each.grad for name, each in model.named_parameters() if each.grad is not None})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "llava", "llava_next", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("method", METHODS)
def test_a_preference_loss(method, family, side, monkeypatch):
    monkeypatch.setattr("mmpeft_fast.contexts.LEAST_SHARED", 4)
    model = add_peft(tiny_model(family).train(), make_method(method, **small_settings(method)))
    randomize_trainable(model)
    model, batch = model.double(), in_double(pairs(family, side))

    def step(model):
        model.zero_grad(set_to_none=True)
        chosen, rejected = log_probs(model, batch).chunk(2)
        loss = -nn.functional.logsigmoid(chosen - rejected).mean()
        loss.backward()
        return loss.detach(), grads(model)

    expected, expected_grads = step(model)
    fused = fuse(copy.deepcopy(model), share_contexts=True)
    loss, found = step(fused)
    if (method, side) == ("prefix", "left"):
        assert fuse_report(fused).contexts == "in 0 calls of 1 (1 with padding on the left and a trained prefix)"
    else:
        assert fuse_report(fused).contexts == "in 1 calls of 1"
    assert_same_in_double(loss, expected, "loss")
    assert found.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        assert_same_in_double(found[name], grad, name)


def test_a_loss_from_labels():
    model = add_peft(tiny_model("llava").train(), LoRA(r=4, dropout=0.0))
    randomize_trainable(model)
    model, batch = model.double(), in_double(pairs("llava", "right"))
    batch = {name: torch.cat((each, each)) for name, each in batch.items()}  # whole rows alike, beginnings too
    fused = fuse(copy.deepcopy(model), share_contexts=True)
    expected = fuse(model)(**batch).loss
    expected.backward()
    loss = fused(**batch).loss
    loss.backward()
    assert fuse_report(fused).contexts == "in 1 calls of 1"
    assert_same_in_double(loss, expected, "loss")
    for name, grad in grads(model).items():
        assert_same_in_double(grads(fused)[name], grad, name)


def test_calls_that_share_nothing():
    model = fuse(add_peft(tiny_model("llama"), LoRA(r=4)), share_contexts=True).eval()
    ids = torch.randint(first_text_token(), VOCABULARY, (1, 40)).repeat(2, 1)
    model(input_ids=ids)
    model.base_model(input_ids=ids[:1], use_cache=False)
    model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True)
    positions = torch.arange(40).expand(2, -1)
    model.base_model(input_ids=ids, use_cache=False, position_ids=positions)
    model.base_model(inputs_embeds=torch.zeros(2, 4, model.config.hidden_size), use_cache=False)
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda *_: None)
    model.base_model(input_ids=ids, use_cache=False)
    handle.remove()
    said = fuse_report(model).contexts
    assert said.startswith("in 0 calls of 6")
    for reason in ("with a cache", "no rows begin alike", "more than the last hidden states", "with position_ids",
                   "without token ids", "a layer that is not fused"):  # fmt: skip
        assert reason in said
    plain = unfuse(copy.deepcopy(model))
    shared = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(shared, plain.base_model(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-5)
    assert not any(map(is_swapped, plain.modules()))
    assert fuse_report(fuse(model)).contexts is None


@pytest.mark.parametrize("family, reason", [("qwen_vl", "found by rows"), ("mistral", "window slides")])
def test_families_whose_rows_are_no_documents(family, reason):
    model = tiny_model(family)
    if family == "mistral":
        model.config.sliding_window = 8
    with pytest.raises(ValueError, match=f"expected share_contexts=False for family '{family}': its .*{reason}"):
        fuse(model, share_contexts=True)

"""Samples in one row: the same loss and gradients as in rows of their own, and what they share there once."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch

from mmpeft_fast import LoRA, add_peft, fuse
from mmpeft_fast.data import (
    IGNORE_INDEX,
    Collator,
    Sample,
    SharedContextCollator,
    train_tokenizer,
    why_not_packed,
    without_hints,
)
from mmpeft_fast.models import FAMILIES, tiny_model, tiny_processor
from tests.tiny_models import randomize_trainable

QUESTIONS = ("what color is it?", "what color is it?", "is it red?", "is it a square or is it round, or what?", "why?")
ANSWERS = ("red", "it is blue", "yes", "round", "because\nI see 12 of it.")
FAMILY = {"llava": "llava", "tiles": "llava_next", "grid": "qwen2_5_vl", "deep": "qwen3_vl", "text": "llama"}


@pytest.fixture(scope="module", params=sorted(FAMILY))
def setting(request, tmp_path_factory, image_folder):
    """(family, samples, processor): two images, one of them under two names, and a sample without."""
    family = FAMILY[request.param]
    folder = tmp_path_factory.mktemp("copies")
    copied = shutil.copy(image_folder / "0.png", folder / "another.png")
    images = [
        image_folder / "0.png",
        folder / copied,
        image_folder / "1.png",
        image_folder / "0.png",
        image_folder / "1.png",
    ]
    if request.param == "text":
        images = [None] * 5
    samples = [
        Sample(id=str(i), questions=(f"<image>\n{q}" if image else q,), answers=(a,), image=image, source=f"sample {i}")
        for i, (q, a, image) in enumerate(zip(QUESTIONS, ANSWERS, images, strict=True))
    ]
    samples.append(replace(samples[0], questions=("is the sky blue?",), image=None, source="no image"))
    tokenizer = train_tokenizer(samples, FAMILIES[family].special_tokens)
    processor = tiny_processor(family, tokenizer)
    return family, samples, processor


def adapted(family, processor):
    torch.manual_seed(0)
    return add_peft(tiny_model(family, getattr(processor, "tokenizer", processor), seed=0), LoRA(r=4, dropout=0.0))


def in_double(batch):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def loss_and_gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(**in_double(batch)).loss
    loss.backward()
    return loss, [p.grad for p in model.parameters() if p.grad is not None]


def test_loss_and_gradients_are_those_of_padded_samples(setting):
    family, samples, processor = setting
    model = adapted(family, processor)
    randomize_trainable(model)
    fused = fuse(copy.deepcopy(model.train().double()))
    padded = Collator(processor)(samples)
    expected = [loss_and_gradients(fused, padded), loss_and_gradients(model, without_hints(padded))]
    for collator in (
        SharedContextCollator(processor, context="packed"),
        SharedContextCollator(processor),
        SharedContextCollator(processor, multiple_of=64),
    ):
        batch = collator(samples)
        assert batch["input_ids"].shape[0] == 1 and not batch["input_ids"].shape[1] % collator.multiple_of
        # Unfused by a dense mask.
        found = [loss_and_gradients(fused, batch), loss_and_gradients(model, without_hints(batch))]
        for (loss, gradients), (wanted_loss, wanted) in zip(found, expected, strict=True):
            torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=1e-6)
            for mine, theirs in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item() + 1e-12)


def test_what_is_shared(setting):
    family, samples, processor = setting
    whole = sum(SharedContextCollator(processor, context="packed")(samples)["documents"].lengths)
    batch = SharedContextCollator(processor)(samples)
    (row,) = batch["documents"].rows
    if family == "llama":  # the texts begin alike with less than what is worth sharing
        assert all(parent == -1 for _, parent in row)
        return
    contexts = [index for index, _ in enumerate(row) if index in {parent for _, parent in row}]
    assert len(contexts) == 2 and [sum(parent == c for _, parent in row) for c in contexts] == [3, 2]
    assert sum(batch["documents"].lengths) == whole - 2 * row[contexts[0]][0] - row[contexts[1]][0] < 0.7 * whole
    assert len(batch.get("image_grid_thw", batch["pixel_values"])) == 2
    supervised = (Collator(processor)(samples)["labels"][:, 1:] != IGNORE_INDEX).sum()
    assert (batch["labels"][:, 1:] != IGNORE_INDEX).sum() == supervised == batch["supervised_capacity"]


def test_equal_questions_keep_a_token_before_their_answers(setting):
    """Samples that differ in the answer alone: the token that predicts it is not shared."""
    _, samples, processor = setting
    twice = [samples[0], replace(samples[0], answers=("green, I think",)), samples[0]]
    batch = SharedContextCollator(processor)(twice)
    labels, position = batch["labels"][0], 0
    for size, _ in batch["documents"].rows[0]:
        assert labels[position] == IGNORE_INDEX
        position += size


def test_positions_go_on_behind_the_context(setting):
    _, samples, processor = setting
    batch = SharedContextCollator(processor)(samples)
    own = [row["position_ids"][..., 0, :] for row in (SharedContextCollator(processor)([each]) for each in samples)]
    paths, start = [], 0  # of each document its positions behind those above it
    for size, parent in batch["documents"].rows[0]:
        positions = batch["position_ids"][..., 0, start : start + size]
        paths.append(positions if parent < 0 else torch.cat((paths[parent], positions), dim=-1))
        start += size
    parents = {parent for _, parent in batch["documents"].rows[0]}
    found = sorted(path.tolist() for index, path in enumerate(paths) if index not in parents)
    assert found == sorted(row.tolist() for row in own)


def test_processors_that_are_refused(samples):
    family = "qwen_vl"
    processor = tiny_processor(family, train_tokenizer(samples, FAMILIES[family].special_tokens))
    assert why_not_packed(processor) == FAMILIES[family].why_not_packed
    with pytest.raises(ValueError, match=r"expected a model whose samples can share a row, but its .*; use Collator"):
        SharedContextCollator(processor)


def test_settings_are_checked_and_named(setting):
    _, _, processor = setting
    with pytest.raises(ValueError, match=r"context: expected one of \['shared', 'packed'\], got 'padded'"):
        SharedContextCollator(processor, context="padded")
    assert SharedContextCollator(processor).settings["context"] == "shared"


def test_transformers_trainer_takes_it(setting, tmp_path):
    from transformers import Trainer, TrainingArguments

    family, samples, processor = setting
    losses = {}
    for collator in (Collator(processor), SharedContextCollator(processor)):
        model = fuse(adapted(family, processor))
        arguments = TrainingArguments(
            str(tmp_path / type(collator).__name__), max_steps=2, per_device_train_batch_size=6, report_to=[],
            remove_unused_columns=False, use_cpu=True, logging_steps=1, save_strategy="no", disable_tqdm=True,
            learning_rate=0.1, optim="sgd", seed=1,
        )  # fmt: skip
        trainer = Trainer(model, arguments, data_collator=collator, train_dataset=samples)
        trainer.train()
        losses[type(collator).__name__] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses["Collator"] == pytest.approx(losses["SharedContextCollator"], rel=1e-3)

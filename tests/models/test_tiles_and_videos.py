"""LLaVA-NeXT and LLaVA-OneVision: images in tiles of any shape, several images, videos, the planner's arithmetic."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmpeft_fast import LoRA, add_peft, fuse
from mmpeft_fast.data import Collator, Sample, train_tokenizer
from mmpeft_fast.models import FAMILIES, tiny_model, tiny_processor
from mmpeft_fast.models.inputs import image_shape
from tests.test_parity import assert_same_training_step
from tests.tiny_models import first_text_token, randomize_trainable, tiny_batch, token_id
from tests.tiny_models import tiny_model as model_of_ids

TILED = ["llava_next", "llava_onevision"]
# Height and width: squares, one that pads above and below, one at the sides, a sliver, odd ones.
SIZES = [(64, 64), (32, 32), (40, 64), (64, 40), (100, 30), (33, 130), (7, 7)]
SAMPLE = Sample(id="0", questions=("<image>\nwhat is it?",), answers=("a cat",))


@pytest.fixture(scope="module")
def tokenizers():
    return {family: train_tokenizer([SAMPLE], FAMILIES[family].special_tokens) for family in TILED}


def batch_of(tokenizer, family, folder, sizes):
    samples = []
    for i, (height, width) in enumerate(sizes):
        path = folder / f"{i}.png"
        Image.effect_noise((width, height), 64).convert("RGB").save(path)
        samples.append(replace(SAMPLE, image=path))
    return Collator(tiny_processor(family, tokenizer))(samples)


@pytest.mark.parametrize("family", TILED)
def test_processor_and_model_agree_on_every_shape(family, tokenizers, tmp_path):
    """The model itself refuses a number of image tokens that is not that of its features."""
    batch = batch_of(tokenizers[family], family, tmp_path, SIZES)
    assert batch["image_sizes"].tolist() == [list(size) for size in SIZES]
    model = add_peft(tiny_model(family, tokenizers[family], seed=0), LoRA(r=4, alpha=8, dropout=0.0)).train()
    randomize_trainable(model)
    hints = {name: batch.pop(name) for name in ("supervised_capacity", "right_padded")}
    eager = model(**batch).loss
    torch.testing.assert_close(fuse(model)(**batch, **hints).loss, eager)


@pytest.mark.parametrize("family", TILED)
@pytest.mark.parametrize("side", [7, 32, 33, 64, 130])
def test_the_planner_counts_tokens_and_tiles_as_the_processor_does(family, side, tokenizers, tmp_path):
    tokenizer = tokenizers[family]
    batch = batch_of(tokenizer, family, tmp_path, [(side, side)])
    config = FAMILIES[family].tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids)
    shape = image_shape(config, side)
    assert shape.ids == (config.image_token_id,) * int((batch["input_ids"] == config.image_token_id).sum())
    assert batch["pixel_values"].shape == (1, shape.tiles, 3, shape.side, shape.side)
    assert tuple(batch["image_sizes"][0].tolist()) == shape.image_size


def test_tokens_of_an_image_at_published_sizes():
    """672 x 672 pixels in four tiles of 24 x 24 features; nine whole images at most where tiles are many."""
    next_7b, onevision = (
        FAMILIES[family].sizes[size]()
        for family, size in (("llava_next", "llava-v1.6-vicuna-7b"), ("llava_onevision", "llava-onevision-7b"))
    )
    assert len(image_shape(next_7b, 672).ids) == 24**2 + 48 * 49
    assert len(image_shape(onevision, 768).ids) == 27**2 + 54 * 55
    assert len(image_shape(onevision, 2304).ids) == 27**2 + 81 * 82
    with pytest.raises(ValueError, match="image_size: expected at least 1 pixel, got -3"):
        image_shape(onevision, -3)


@pytest.mark.parametrize("train_connector", [False, True])
def test_a_video_beside_an_image(train_connector):
    """Frames of 2 x 2 patches pooled to one feature each, and a newline."""
    num_frames = 3
    batch = tiny_batch("llava_onevision", padding_side="right")
    video = torch.full((3, num_frames + 1), token_id("<video>"))
    text = torch.full((3, 2), first_text_token())
    batch["input_ids"] = torch.cat([text, video, batch["input_ids"]], dim=1)
    added = torch.ones_like(batch["input_ids"][:, : 2 + num_frames + 1])
    batch["attention_mask"] = torch.cat([added, batch["attention_mask"]], dim=1)
    batch["labels"] = torch.cat([-100 * added, batch["labels"]], dim=1)
    batch["pixel_values_videos"] = torch.randn(3, num_frames, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model = add_peft(
        model_of_ids("llava_onevision"), LoRA(r=4, alpha=8, dropout=0.0), train_connector=train_connector
    ).train()
    randomize_trainable(model)
    assert_same_training_step(model, batch)


def test_several_images_of_a_sample_are_not_tiled():
    """LLaVA-OneVision takes each of several images whole: 4 features and a newline."""
    batch = tiny_batch("llava_onevision", batch_size=1, padding_side=None)
    ids = torch.full((1, 20), first_text_token())
    ids[:, 1:6] = ids[:, 7:12] = token_id("<image>")
    batch |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(ids > 3, ids, -100)}
    batch["labels"][:, :16] = -100
    batch["pixel_values"] = batch["pixel_values"][:, :1].repeat(2, 1, 1, 1, 1)
    batch |= {"image_sizes": torch.tensor([[64, 64], [40, 64]]), "batch_num_images": torch.tensor([2])}
    model = add_peft(model_of_ids("llava_onevision"), LoRA(r=4, alpha=8, dropout=0.0)).train()
    randomize_trainable(model)
    assert_same_training_step(model, batch)


@pytest.mark.parametrize("family", TILED)
def test_connector_is_the_projector_and_the_newline_stays_frozen(family):
    model = add_peft(model_of_ids(family), LoRA(r=2), train_connector=True)
    base = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "branches" not in name]
    assert base and all(name.startswith("model.multi_modal_projector.") for name in base)
    assert not model.model.image_newline.requires_grad

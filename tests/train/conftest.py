"""A few short samples with images on disk, and a model small enough to take a training step in milliseconds."""

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmpeft_fast.data import Collator, load_conversations, train_tokenizer
from mmpeft_fast.models import FAMILIES
from mmpeft_fast.train import seed_everything

# Answers of different length, so that a mean of micro-batch means is not the mean over tokens.
ANSWERS = ("red", "blue", "no, it is not red at all", "yes", "a green square, I think", "no", "seven of them", "yes")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> tuple[Path, Path]:
    """The conversation file and its image folder."""
    folder = tmp_path_factory.mktemp("data")
    entries = []
    for index, answer in enumerate(ANSWERS):
        Image.new("RGB", (28, 28), (30 * index, 90, 200 - 20 * index)).save(folder / f"{index}.png")
        turns = [{"from": "human", "value": f"<image>\nwhat is {index}?"}, {"from": "gpt", "value": answer}]
        entries.append({"id": index, "image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json", folder


@pytest.fixture(scope="session")
def samples(data):
    return load_conversations(*data)


@pytest.fixture(scope="session")
def tokenizer(samples):
    return train_tokenizer(samples, FAMILIES["llava"].special_tokens)


@pytest.fixture(scope="session")
def collator(tokenizer):
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=FAMILIES["llava"].chat_template,
    )
    return Collator(processor)


@pytest.fixture
def make_model(tokenizer):
    """A function that builds the same LLaVA every time; dropout makes its steps draw from torch's generator."""

    def make_model(dropout: float = 0.0):
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        text = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=dropout,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        seed_everything(0)
        image_token = tokenizer.convert_tokens_to_ids("<image>")
        return LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
        )

    return make_model

"""A handful of conversations with real image files, and a real processor of each family around a trained tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmpeft_fast.data import Sample, train_tokenizer
from mmpeft_fast.models import FAMILIES, tiny_processor


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (64, 64), color).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def samples(image_folder) -> list[Sample]:
    """One turn with the image first; three turns with odd text and the image last; one turn without an image."""
    one = Sample(id="0", questions=("<image>\nwhat color is it?",), answers=("red",), image=image_folder / "0.png")
    three = replace(
        one,
        id="1",
        questions=("what color is it?\n<image>", "are you  sure? Ünïcode 😀", "why?"),
        answers=("blue", "yes, very  sure 😀", "because\n\nI see 12 of it.\nOK"),
        image=image_folder / "1.png",
    )
    return [one, three, replace(one, id="2", questions=("is the sky blue?",), answers=("no",), image=None)]


@pytest.fixture(scope="session", params=[name for name, family in FAMILIES.items() if family.vision_tower])
def processor(request, samples):
    tokenizer = train_tokenizer(samples, FAMILIES[request.param].special_tokens)
    return tiny_processor(request.param, tokenizer)

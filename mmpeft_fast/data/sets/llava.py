"""LLaVA's instruction data (Liu et al. 2023) as conversation JSON, with the images where its README puts them."""

from dataclasses import fields
from typing import Any

from mmpeft_fast.data.conversations import Sample, conversation, entries
from mmpeft_fast.data.sets.dataset import DataSet, Place, TaskSample

_COCO = "llava/images/coco/train2017"
# The file and what its images are relative to: LLaVA-1.5's mixture, the first LLaVA's data, and its dialogues alone.
_FILES = {
    "mix665k": ("llava/llava_v1_5_mix665k.json", "llava/images"),
    "instruct150k": ("llava/llava_instruct_150k.json", _COCO),
    "conversation58k": ("llava/conversation_58k.json", _COCO),
}


def _sample(record: Any, place: Place) -> TaskSample:
    found = conversation(record, place.where, place.root / _FILES[place.split][1], set())
    return TaskSample(**{field.name: getattr(found, field.name) for field in fields(Sample)}, references=found.answers)


LLAVA = DataSet(
    name="llava",
    title="LLaVA conversations",
    published="https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
    splits=tuple(_FILES),
    metric="exact_match",
    files=lambda split: _FILES[split],
    records=lambda root, split: entries(root / _FILES[split][0]),
    sample=_sample,
)

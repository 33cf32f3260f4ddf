"""POPE (Li et al. 2023): is an object in the COCO image? Its absent objects are random, popular or adversarial ones."""

from typing import Annotated

from mmpeft_fast.data import prompts
from mmpeft_fast.data.sets.dataset import DataSet, Place, TaskSample, existing, question, take, take_text
from mmpeft_fast.fields import one_of
from mmpeft_fast.json_text import parse, text_lines


def _file(split: str) -> str:
    return f"pope/coco_pope_{split}.json"


def _sample(line: str, place: Place) -> TaskSample:
    record = parse(line, place.where)
    label = take(record, "label", Annotated[str, one_of("yes", "no")])
    image = existing(place.root / "coco/val2014" / take_text(record, "image"))
    prompt = prompts.vqa(take_text(record, "text"))
    return question(place, take(record, "question_id", int), prompt, label, image)


POPE = DataSet(
    name="pope",
    title="POPE",
    published="https://github.com/AoiDragon/POPE",
    splits=("random", "popular", "adversarial"),
    metric="pope",
    files=lambda split: (_file(split), "coco/val2014"),
    records=lambda root, split: text_lines(root / _file(split)),
    sample=_sample,
)

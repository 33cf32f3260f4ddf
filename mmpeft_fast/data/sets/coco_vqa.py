"""The files that VQAv2 and OKVQA share: questions and annotations of COCO images, joined by question_id."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft_fast.data import prompts
from mmpeft_fast.data.sets.dataset import (
    Place,
    TaskSample,
    existing,
    most_common,
    question,
    read_field,
    take,
    take_answers,
    take_text,
)


def coco_image(root: Path, split: str, image_id: int) -> Path:
    """The file of a COCO 2014 image. Raises ValueError where it is missing."""
    folder = f"{split}2014"
    return existing(root / "coco" / folder / f"COCO_{folder}_{image_id:012d}.jpg")


def records(questions_path: Path, annotations_path: Path) -> Iterator[tuple[str, Any]]:
    """Each question with its annotation's fields. A question that nobody answered lacks `answers`."""
    asked = read_field(questions_path, "questions", list)
    annotations = read_field(annotations_path, "annotations", list)
    answered = {each["question_id"]: each for each in annotations if isinstance(each, dict) and "question_id" in each}
    for index, each in enumerate(asked):
        where = f"{questions_path} entry {index}"
        if isinstance(each, dict):
            where += f" (question_id {each.get('question_id')})"
            each = {**answered.get(each.get("question_id"), {}), **each}
        yield where, each


def sample(record: Any, place: Place) -> TaskSample:
    """A question whose answer in training is the one that most of the ten people gave."""
    answers = take_answers(record)
    image = coco_image(place.root, place.split, take(record, "image_id", int))
    prompt = prompts.vqa(take_text(record, "question"))
    return question(place, take(record, "question_id", int), prompt, most_common(answers), image, references=answers)

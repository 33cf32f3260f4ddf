"""ScienceQA (Lu et al. 2022), the questions with an image: lettered choices, the answer is a letter."""

from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmpeft_fast.data import prompts
from mmpeft_fast.data.sets.dataset import (
    DataSet,
    Place,
    TaskSample,
    existing,
    question,
    read_as,
    read_field,
    take,
    take_text,
    take_texts,
)

_PROBLEMS, _SPLITS = "scienceqa/problems.json", "scienceqa/pid_splits.json"


def _records(root: Path, split: str) -> Iterator[tuple[str, Any]]:
    """The split's problems that have an image; the file says null where there is none."""
    problems = read_as(root / _PROBLEMS, dict)
    for pid in read_field(root / _SPLITS, split, list[str]):
        problem = problems.get(pid)
        if not isinstance(problem, dict):
            yield f"{root / _PROBLEMS} problem {pid}", problem
        elif problem.get("image") is not None:
            yield f"{root / _PROBLEMS} problem {pid}", {**problem, "pid": pid}


def _sample(record: Any, place: Place) -> TaskSample:
    choices, index = take_texts(record, "choices"), take(record, "answer", int)
    prompt = prompts.science_qa(take_text(record, "question"), choices)
    if not 0 <= index < len(choices):
        raise ValueError(f"answer: expected the index of one of {len(choices)} choices, got {index}")
    image = existing(place.root / "scienceqa/images" / place.split / record["pid"] / take_text(record, "image"))
    return question(place, record["pid"], prompt, ascii_uppercase[index], image, choices=choices)


SCIENCE_QA = DataSet(
    name="scienceqa",
    title="ScienceQA (image part)",
    published="https://github.com/lupantech/ScienceQA",
    splits=("train", "val", "test"),
    metric="option_accuracy",
    files=lambda split: (_PROBLEMS, _SPLITS, f"scienceqa/images/{split}"),
    records=_records,
    sample=_sample,
)

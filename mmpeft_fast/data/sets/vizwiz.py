"""VizWiz (Gurari et al. 2018): questions of blind people about their own photographs; some cannot be answered.

The annotators wrote "unanswerable" in lower case, the prompt asks for "Unanswerable". The answer in training is theirs,
since the official score compares letter for letter where all ten agree.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft_fast.data import prompts
from mmpeft_fast.data.sets.dataset import (
    DataSet,
    Place,
    TaskSample,
    existing,
    most_common,
    question,
    read_as,
    take_answers,
    take_text,
)


def _annotations(split: str) -> str:
    return f"vizwiz/Annotations/{split}.json"


def _records(root: Path, split: str) -> Iterator[tuple[str, Any]]:
    path = root / _annotations(split)
    for index, record in enumerate(read_as(path, list)):
        yield f"{path} entry {index}", record


def _sample(record: Any, place: Place) -> TaskSample:
    answers = take_answers(record)
    name = take_text(record, "image")
    image = existing(place.root / "vizwiz" / place.split / name)
    prompt = prompts.vizwiz(take_text(record, "question"))
    return question(place, name, prompt, most_common(answers), image, references=answers)


VIZWIZ = DataSet(
    name="vizwiz",
    title="VizWiz",
    published="https://vizwiz.org/tasks-and-datasets/vqa/",
    splits=("train", "val"),
    metric="vqa_score",
    files=lambda split: (_annotations(split), f"vizwiz/{split}"),
    records=_records,
    sample=_sample,
)

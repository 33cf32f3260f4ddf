"""easy-vqa and its three kinds of questions as data sets of their own; the files are the installed package's."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmpeft_fast.data import prompts
from mmpeft_fast.data.easy_vqa import SPLITS, package_folder
from mmpeft_fast.data.sets.dataset import DataSet, Place, TaskSample, existing, question

_SHAPES = ("circle", "rectangle", "triangle")
_YES_NO = ("yes", "no")


def _kind(answer: str) -> str:
    return "yes-no" if answer in _YES_NO else "shape" if answer in _SHAPES else "color"


def _records(root: Path, split: str, kind: str | None) -> Iterator[tuple[str, Any]]:
    path = package_folder() / "data" / split / "questions.json"
    for index, record in enumerate(json.loads(path.read_text(encoding="utf-8"))):
        if kind is None or _kind(record[1]) == kind:
            yield f"{path} entry {index}", (index, *record)


def _sample(record: Any, place: Place) -> TaskSample:
    index, asked, answer, image_id = record
    image = existing(package_folder() / "data" / place.split / "images" / f"{image_id}.png")
    return question(place, f"{place.split}-{index}", prompts.vqa(asked), answer, image)


EASY_VQA_SETS: dict[str, DataSet] = {
    f"easy-vqa{suffix}": DataSet(
        name=f"easy-vqa{suffix}",
        title=f"easy-vqa{words}",
        published="https://pypi.org/project/easy-vqa",
        splits=SPLITS,
        metric=metric,
        files=lambda split: (),
        records=partial(_records, kind=kind),
        sample=_sample,
    )
    for suffix, words, kind, metric in (
        ("", "", None, "exact_match"),
        ("-yes-no", ", yes or no", "yes-no", "pope"),
        ("-shape", ", what shape", "shape", "exact_match"),
        ("-color", ", what color", "color", "exact_match"),
    )
}

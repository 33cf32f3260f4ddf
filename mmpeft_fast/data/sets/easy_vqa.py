"""easy-vqa and its three kinds of questions as data sets of their own, and captions put together from its answers.

The files are the installed package's.
"""

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


def _captions(root: Path, split: str) -> Iterator[tuple[str, Any]]:
    """One record an image of which shape and colour are asked: `a red circle`."""
    known: dict[int, dict[str, str]] = {}
    for _, (_, _, answer, image_id) in _records(root, split, None):
        known.setdefault(image_id, {})[_kind(answer)] = answer
    path = package_folder() / "data" / split / "questions.json"
    for image_id, facts in known.items():
        if {"shape", "color"} <= facts.keys():
            yield f"{path} image {image_id}", (image_id, f"a {facts['color']} {facts['shape']}")


def _caption(record: Any, place: Place) -> TaskSample:
    image_id, text = record
    return question(place, f"{place.split}-image-{image_id}", prompts.caption(), text, _image(place.split, image_id))


def _image(split: str, image_id: int) -> Path:
    return existing(package_folder() / "data" / split / "images" / f"{image_id}.png")


def _sample(record: Any, place: Place) -> TaskSample:
    index, asked, answer, image_id = record
    return question(place, f"{place.split}-{index}", prompts.vqa(asked), answer, _image(place.split, image_id))


EASY_VQA_SETS: dict[str, DataSet] = {
    f"easy-vqa{suffix}": DataSet(
        name=f"easy-vqa{suffix}",
        title=f"easy-vqa{words}",
        published="https://pypi.org/project/easy-vqa",
        splits=SPLITS,
        metric=metric,
        files=lambda split: (),
        records=records,
        sample=sample,
    )
    for suffix, words, metric, records, sample in (
        ("", "", "exact_match", partial(_records, kind=None), _sample),
        ("-yes-no", ", yes or no", "pope", partial(_records, kind="yes-no"), _sample),
        ("-shape", ", what shape", "exact_match", partial(_records, kind="shape"), _sample),
        ("-color", ", what color", "exact_match", partial(_records, kind="color"), _sample),
        ("-caption", ", captions", "exact_match", _captions, _caption),
    )
}

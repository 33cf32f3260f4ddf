"""OCRVQA (Mishra et al. 2019): five questions about a book's cover, one answer each."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from mmpeft_fast.data import prompts
from mmpeft_fast.data.sets.dataset import (
    DataSet,
    Place,
    TaskSample,
    existing,
    question,
    read_as,
    take,
    take_text,
)

_FILE, _IMAGES = "ocrvqa/dataset.json", "ocrvqa/images"
_SPLIT_NUMBERS = {"train": 1, "val": 2, "test": 3}


def _records(root: Path, split: str) -> Iterator[tuple[str, Any]]:
    """A record a question; a book whose questions cannot be told apart is one record."""
    path = root / _FILE
    for name, book in read_as(path, dict).items():
        if isinstance(book, dict) and book.get("split", _SPLIT_NUMBERS[split]) != _SPLIT_NUMBERS[split]:
            continue
        asked = book.get("questions") if isinstance(book, dict) else None
        for index in range(len(asked) if isinstance(asked, list) else 1):
            yield f"{path} book {name} question {index}", (name, index, book)


def _sample(record: Any, place: Place) -> TaskSample:
    name, index, book = record
    take(book, "split", int)
    asked, answers = take(book, "questions", list[str]), take(book, "answers", list[str])
    if len(asked) != len(answers):
        raise ValueError(f"answers: expected one for each of {len(asked)} questions, got {len(answers)}")
    if not (asked[index].strip() and answers[index].strip()):
        raise ValueError(f"expected a question and an answer, got {asked[index]!r} and {answers[index]!r}")
    # The publisher's downloader names a file by its address; others save them all as .jpg.
    suffix = PurePosixPath(urlparse(take_text(book, "imageURL")).path).suffix
    image = existing(place.root / _IMAGES / f"{name}{suffix}", place.root / _IMAGES / f"{name}.jpg")
    return question(place, f"{name}-{index}", prompts.vqa(asked[index].strip()), answers[index].strip(), image)


OCR_VQA = DataSet(
    name="ocrvqa",
    title="OCRVQA",
    published="https://ocr-vqa.github.io",
    splits=("train", "val", "test"),
    metric="exact_match",
    files=lambda split: (_FILE, _IMAGES),
    records=_records,
    sample=_sample,
)

"""What a published data set is here: its files, its records, and how a record becomes a sample of the study."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmpeft_fast.data import prompts
from mmpeft_fast.data.conversations import Sample
from mmpeft_fast.fields import check_value, shown
from mmpeft_fast.json_text import read


@dataclass(frozen=True, kw_only=True)
class TaskSample(Sample):
    """A sample with what its metric needs: every answer that counts, and the choices where there are some."""

    references: tuple[str, ...]
    choices: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a record stands: the folder of all data sets, the split, words for messages, and draws of its own."""

    root: Path
    split: str
    where: str
    draws: random.Random


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A published data set in the file layout of its publisher.

    published: where it can be got. metric: a name in `study.metrics.METRICS`. files: what a split needs, relative to
    the folder of all data sets; COCO's images are in `coco/`, where three sets share them. records: yields each record
    of a split with the words that say where it stands; raises ValueError where a file as a whole cannot be read.
    sample: the record as a sample; raises ValueError without those words for a record that is malformed.
    """

    name: str
    title: str
    published: str
    splits: tuple[str, ...]
    metric: str
    files: Callable[[str], tuple[str, ...]]
    records: Callable[[Path, str], Iterator[tuple[str, Any]]]
    sample: Callable[[Any, Place], TaskSample]

    def missing(self, root: Path, split: str) -> list[str]:
        """The split's files and folders that are not there."""
        return [name for name in self.files(split) if not (root / name).exists()]


def read_as(path: Path, kind: type) -> Any:
    """What a JSON file holds, a list or an object. Raises ValueError that begins with the path."""
    value = read(path)
    check_value(str(path), value, kind)
    return value


def read_field(path: Path, name: str, kind: Any) -> Any:
    """A field of the object that a JSON file holds. Raises ValueError that begins with the path."""
    record = read_as(path, dict)
    try:
        return take(record, name, kind)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def take(record: Any, name: str, kind: Any) -> Any:
    """A field of a record, of the type `kind` (as `fields.check_value` takes it). Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with {name!r}, got {shown(record)}")
    if name not in record:
        raise ValueError(f"expected a field {name!r}, got {', '.join(map(repr, list(record)[:8])) or 'none'}")
    check_value(name, record[name], kind)
    return record[name]


def take_text(record: Any, name: str) -> str:
    """A text field with something in it, outer spaces removed. Raises ValueError."""
    text = take(record, name, str).strip()
    if not text:
        raise ValueError(f"{name}: expected a text, got an empty one")
    return text


def take_texts(record: Any, name: str) -> tuple[str, ...]:
    """A field that lists at least one text. Raises ValueError."""
    texts = tuple(text.strip() for text in take(record, name, list[str]))
    if not texts or not all(texts):
        raise ValueError(f"{name}: expected a list of texts with something in them, got {shown(list(texts))}")
    return texts


def take_answers(record: Any) -> list[str]:
    """What people answered, as the VQA sets list it; some may have written nothing. Raises ValueError."""
    answers = [take(each, "answer", str).strip() for each in take(record, "answers", list[dict])]
    if not any(answers):
        raise ValueError(f"answers: expected those of ten people, got {shown(answers)}")
    return answers


def most_common(answers: Sequence[str]) -> str:
    """The answer that most people gave; among equals the one that was given first."""
    return Counter(filter(None, answers)).most_common(1)[0][0]


def existing(*paths: Path) -> Path:
    """The first of the paths that is a file. Raises ValueError that names the first one."""
    for path in paths:
        if path.is_file():
            return path
    raise ValueError(f"expected the image file {paths[0]}, found none")


def question(
    place: Place,
    id: str | int,
    prompt: str,
    answer: str,
    image: Path,
    *,
    references: Sequence[str] = (),
    choices: Sequence[str] = (),
) -> TaskSample:
    """A question about an image in the study's form, answered; references: the answer alone where none are given."""
    return TaskSample(
        id=str(id),
        questions=(prompts.with_image(prompt),),
        answers=(answer,),
        image=image,
        source=place.where,
        references=tuple(references) or (answer,),
        choices=tuple(choices),
    )

"""LLaVA's conversation JSON: the one format every data set of the study and every user's data comes in.

[{"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image> What is it?"},
                                                 {"from": "gpt", "value": "A cat."}]}, ...]
"""

import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from mmpeft_fast.fields import shown
from mmpeft_fast.json_text import lines, parse, read_utf8

IMAGE_MARK = "<image>"
_ROLES = ("human", "gpt")
# What PIL and its readers raise for a file that is no image, is cut short, is broken inside, or is too large to be one.
_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, MemoryError),
    *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
# What is read of all images for `data_digest`, at most: seconds. Of one image's beginning and of its end, at least.
_DIGEST_BYTES, LEAST_BYTES = 1 << 31, 4096


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One conversation: `answers[i]` answers `questions[i]`; `questions[0]` holds the image mark iff `image` is set."""

    id: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    image: Path | None = None
    source: str = "sample"
    """Where it came from, for error messages: file, entry and id."""

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat messages with content lists, the form `apply_chat_template` takes."""
        messages = []
        for question, answer in zip(self.questions, self.answers, strict=True):
            messages.append({"role": "user", "content": list(_content(question))})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return messages

    def load_image(self) -> Image.Image | None:
        """The decoded RGB image, or None. Raises ValueError where the file cannot be decoded."""
        if self.image is None:
            return None
        try:
            with Image.open(self.image) as image:
                return image.convert("RGB")
        except _DECODE_ERRORS as error:
            raise self._unreadable(error) from error

    def check_image(self) -> None:
        """Read only the image's header. Raises ValueError where it is not an image."""
        self.image_size()

    def image_size(self) -> tuple[int, int] | None:
        """Width and height by the image's header, or None. Raises ValueError where it is not an image."""
        if self.image is None:
            return None
        try:
            with Image.open(self.image) as image:
                return image.size
        except _DECODE_ERRORS as error:
            raise self._unreadable(error) from error

    def image_digest(self, most: int | None = None) -> str:
        """Digest of the image's file; of its size, beginning and end where it has more than 2 * `most` bytes. Raises
        ValueError where it cannot be read."""
        try:
            with open(self.image, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(0)
                most = size if most is None else most
                digest = hashlib.sha256(b"%d " % size + file.read(most))
                file.seek(max(most, size - most))
                digest.update(file.read(most))
        except OSError as error:
            raise self._unreadable(error) from error
        return digest.hexdigest()

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self.source}: expected a readable image, but {self.image} cannot be decoded ({error})")


def load_conversations(
    json_path: str | Path,
    image_folder: str | Path | None = None,
    *,
    limit: int | None = None,
    images_anywhere: bool = False,
) -> list[Sample]:
    """Load LLaVA's conversation JSON (a list) or JSON lines (`.jsonl`), checked entry by entry.

    json_path: the file. image_folder: what each entry's relative `image` is relative to, None where no entry has one.
    limit: take only the first entries. images_anywhere: whether an `image` may be absolute, or leave the folder by
    `..`. Images must exist; they are decoded by the collator. Raises ValueError that names file, entry and id, what was
    expected and what came.
    """
    path, folder = Path(json_path), None if image_folder is None else Path(image_folder)
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 sample, got {limit}")
    if not path.is_file():
        raise ValueError(f"{path}: expected a conversation file (.json or .jsonl), found no such file")
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of the images, found no such folder")

    known_images: set[Path] = set()
    samples = []
    for where, entry in entries(path):
        if limit is not None and len(samples) == limit:
            break
        samples.append(conversation(entry, where, folder, known_images, images_anywhere))
    if not samples:
        raise ValueError(f"{path}: expected at least one conversation, the file holds none")
    return samples


def check_images(samples: Iterable[Sample]) -> None:
    """Read every distinct image's header, so that a bad file is found before training. Raises ValueError."""
    for sample in {sample.image: sample for sample in samples}.values():
        sample.check_image()


def data_digest(samples: Iterable[Sample]) -> str:
    """Digest of what a model is trained on: every text in order, and the images' files.

    Files are read whole where 2 GiB among as many images are enough for that, else each one's beginning and end, and
    its size: a change of one pixel in a compressed image shows there in practice, reading more would take minutes.
    """
    samples = list(samples)
    images = {sample.image: sample for sample in samples if sample.image is not None}
    most = max(LEAST_BYTES, _DIGEST_BYTES // (2 * max(1, len(images))))
    digests = {None: None} | {image: sample.image_digest(most) for image, sample in images.items()}
    digest = hashlib.sha256()
    for sample in samples:
        words = [sample.questions, sample.answers, digests[sample.image]]
        digest.update(hashlib.sha256(repr(words).encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each entry of a JSON list or of JSON lines with the words that say where it stands."""
    if path.suffix == ".jsonl":
        yield from lines(path)
        return
    text = read_utf8(path)
    if not text.strip():
        raise ValueError(f"{path}: expected a JSON list of conversations, the file is empty")
    found = parse(text, str(path))
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected a JSON list of conversations, got {_kind(found)}")
    for index, entry in enumerate(found):
        yield f"{path} entry {index}", entry


def conversation(
    entry: Any, where: str, folder: Path | None, known_images: set[Path], images_anywhere: bool = False
) -> Sample:
    """One entry as a sample, with its image in `known_images`. Raises ValueError that begins with `where`."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with id, image and conversations, got {_kind(entry)}")
    if "id" in entry:
        where = f"{where} (id {shown(entry['id'])})"
    turns = entry.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: expected 'conversations' to be a non-empty list of turns, got {_kind(turns)}")

    texts: list[str] = []
    for index, turn in enumerate(turns):
        texts.append(_parse_turn(turn, index, where))
    if len(texts) % 2:
        answered = "no gpt turn" if len(texts) == 1 else "a last human turn without answer"
        raise ValueError(f"{where}: expected every human turn to be answered by a gpt turn, got {answered}")
    questions, answers = tuple(texts[::2]), tuple(texts[1::2])

    image = _parse_image(entry.get("image"), where, folder, known_images, images_anywhere)
    marks = questions[0].count(IMAGE_MARK)
    expected = int(image is not None)
    if marks != expected:
        reason = "it has an 'image'" if image is not None else "it has no 'image'"
        raise ValueError(
            f"{where}: expected {expected} {IMAGE_MARK} in the first human turn because {reason}, got {marks}"
        )
    if any(IMAGE_MARK in text for text in texts[1:]):
        raise ValueError(f"{where}: expected {IMAGE_MARK} only in the first human turn, found it in a later turn")
    return Sample(
        id=_name(entry["id"]) if "id" in entry else where.rsplit(" ", 1)[-1],
        questions=questions,
        answers=answers,
        image=image,
        source=where,
    )


def _name(given: Any) -> str:
    return given if isinstance(given, str) else shown(given)


def _parse_turn(turn: Any, index: int, where: str) -> str:
    """The turn's text, its role checked against the order human, gpt, human, gpt."""
    where = f"{where} turn {index}"
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ValueError(f"{where}: expected an object with 'from' and 'value', got {_kind(turn)}")
    role, text = turn["from"], turn["value"]
    if role not in _ROLES:
        raise ValueError(f"{where}: expected role 'human' or 'gpt', got {shown(role)}")
    if role != _ROLES[index % 2]:
        raise ValueError(f"{where}: expected turns to alternate from 'human' to 'gpt', got {role!r} here")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: expected 'value' to be a non-empty text, got {_kind(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: expected 'value' in Unicode, got half a surrogate pair ({error.reason})") from error
    return text.strip()


def _parse_image(
    name: Any, where: str, folder: Path | None, known_images: set[Path], images_anywhere: bool
) -> Path | None:
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: expected 'image' to be one relative path, got {_kind(name)}")
    if folder is None:
        raise ValueError(f"{where}: expected no 'image', as no image folder was given, got {name!r}")
    if not images_anywhere and (PurePath(name).is_absolute() or ".." in PurePath(name).parts):
        raise ValueError(
            f"{where}: expected 'image' inside the image folder, got {name!r}; images_anywhere (--images-anywhere) "
            "takes it"
        )
    image = folder / name
    if image not in known_images:
        if not os.path.isfile(image):
            raise ValueError(f"{where}: expected the image file {image}, found none")
        known_images.add(image)
    return image


def _content(question: str) -> Iterator[dict[str, str]]:
    """Split a question at the image mark into text and image parts, in order."""
    for index, text in enumerate(question.split(IMAGE_MARK)):
        if index:
            yield {"type": "image"}
        if text.strip():
            yield {"type": "text", "text": text.strip()}


def _kind(value: Any) -> str:
    """A short name of what came, for error messages."""
    if value is None:
        return "nothing"
    if isinstance(value, (list, str, dict)) and not value:
        return {list: "an empty list", str: "an empty text", dict: "an empty object"}[type(value)]
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(repr, list(value)[:4]))}"
    text = shown(value)
    return text if len(text) <= 40 else f"{text[:40]}.."

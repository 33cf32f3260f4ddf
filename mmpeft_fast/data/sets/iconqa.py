"""IconQA (Lu et al. 2021): diagrams of icons; the study takes "choose a text" and "fill in the blank"."""

from collections.abc import Iterator
from pathlib import Path

from mmpeft_fast.data import prompts
from mmpeft_fast.data.sets.dataset import DataSet, Place, TaskSample, existing, question, take, take_text, take_texts
from mmpeft_fast.json_text import read

_PUBLISHED = "https://iconqa.github.io"
_SPLITS = ("train", "val", "test")


def _folder(split: str, task: str) -> str:
    return f"iconqa_data/iconqa/{split}/{task}"


def _records(root: Path, split: str, task: str) -> Iterator[tuple[str, Path]]:
    """Each problem has a folder of its own; what cannot be read there is that problem's fault alone."""
    for folder in sorted((root / _folder(split, task)).iterdir(), key=lambda each: (len(each.name), each.name)):
        if folder.is_dir():
            yield str(folder / "data.json"), folder


def _choose_text(folder: Path, place: Place) -> TaskSample:
    record = read(folder / "data.json")
    choices, index = take_texts(record, "choices"), take(record, "answer", int)
    prompt = prompts.iconqa_txt(take_text(record, "question"), choices)
    if not 0 <= index < len(choices):
        raise ValueError(f"answer: expected the index of one of {len(choices)} choices, got {index}")
    return question(place, folder.name, prompt, choices[index], existing(folder / "image.png"), choices=choices)


def _fill_in_blank(folder: Path, place: Place) -> TaskSample:
    record = read(folder / "data.json")
    prompt = prompts.iconqa_blank(take_text(record, "question"))
    return question(place, folder.name, prompt, take_text(record, "answer"), existing(folder / "image.png"))


ICONQA_TXT = DataSet(
    name="iconqa-txt",
    title="IconQA, choose a text",
    published=_PUBLISHED,
    splits=_SPLITS,
    metric="option_accuracy",
    files=lambda split: (_folder(split, "choose_txt"),),
    records=lambda root, split: _records(root, split, "choose_txt"),
    sample=_choose_text,
)
ICONQA_BLANK = DataSet(
    name="iconqa-blank",
    title="IconQA, fill in the blank",
    published=_PUBLISHED,
    splits=_SPLITS,
    metric="exact_match",
    files=lambda split: (_folder(split, "fill_in_blank"),),
    records=lambda root, split: _records(root, split, "fill_in_blank"),
    sample=_fill_in_blank,
)

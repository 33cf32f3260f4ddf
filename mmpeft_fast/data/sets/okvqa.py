"""OKVQA (Marino et al. 2019): questions that need knowledge from outside of the COCO image.

Five people answered; the files hold each answer twice and in a normal form, which the official score compares too."""

from mmpeft_fast.data.sets import coco_vqa
from mmpeft_fast.data.sets.dataset import DataSet


def _texts(split: str) -> tuple[str, str]:
    names = (f"OpenEnded_mscoco_{split}2014_questions.json", f"mscoco_{split}2014_annotations.json")
    return tuple(f"okvqa/{name}" for name in names)


OKVQA = DataSet(
    name="okvqa",
    title="OKVQA",
    published="https://okvqa.allenai.org/download.html",
    splits=("train", "val"),
    metric="vqa_score",
    files=lambda split: (*_texts(split), f"coco/{split}2014"),
    records=lambda root, split: coco_vqa.records(*(root / name for name in _texts(split))),
    sample=coco_vqa.sample,
)

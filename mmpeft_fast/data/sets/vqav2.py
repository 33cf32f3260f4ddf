"""VQAv2 (Goyal et al. 2017): about 5.4 questions a COCO image, ten answers each."""

from mmpeft_fast.data.sets import coco_vqa
from mmpeft_fast.data.sets.dataset import DataSet


def _texts(split: str) -> tuple[str, str]:
    names = (f"v2_OpenEnded_mscoco_{split}2014_questions.json", f"v2_mscoco_{split}2014_annotations.json")
    return tuple(f"vqav2/{name}" for name in names)


VQAV2 = DataSet(
    name="vqav2",
    title="VQAv2",
    published="https://visualqa.org/download.html",
    splits=("train", "val"),
    metric="vqa_score",
    files=lambda split: (*_texts(split), f"coco/{split}2014"),
    records=lambda root, split: coco_vqa.records(*(root / name for name in _texts(split))),
    sample=coco_vqa.sample,
)

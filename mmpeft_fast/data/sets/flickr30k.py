"""Flickr30k (Young et al. 2014) in Karpathy's split: five captions an image, scored by CIDEr on 1,000 test images.

The study's 31k training images may contain the test images; this split's training images do not. A training sample is
an image with one of its captions and one of the study's ten requests, both drawn with the seed; a test image is always
asked with the first request.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmpeft_fast.data import prompts
from mmpeft_fast.data.sets.dataset import DataSet, Place, TaskSample, existing, question, read_field, take, take_text

_CAPTIONS, _IMAGES = "flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k-images"


def _records(root: Path, split: str) -> Iterator[tuple[str, Any]]:
    path = root / _CAPTIONS
    for index, record in enumerate(read_field(path, "images", list)):
        if not isinstance(record, dict) or record.get("split", split) == split:
            yield f"{path} image {index}", record


def _sample(record: Any, place: Place) -> TaskSample:
    captions = [take_text(each, "raw") for each in take(record, "sentences", list[dict])]
    if not captions:
        raise ValueError("sentences: expected at least one caption, got none")
    take_text(record, "split")
    name = take_text(record, "filename")
    image = existing(place.root / _IMAGES / name)
    is_train = place.split == "train"
    caption = place.draws.choice(captions) if is_train else captions[0]
    request = prompts.caption(place.draws.randrange(len(prompts.CAPTION_REQUESTS)) if is_train else 0)
    return question(place, name, request, caption, image, references=captions)


FLICKR30K = DataSet(
    name="flickr30k",
    title="Flickr30k (Karpathy split)",
    published="https://shannon.cs.illinois.edu/DenotationGraph (images), "
    "https://cs.stanford.edu/people/karpathy/deepimagesent (captions and split)",
    splits=("train", "val", "test"),
    metric="cider",
    files=lambda split: (_CAPTIONS, _IMAGES),
    records=_records,
    sample=_sample,
)

"""Loading a split of a data set, and what is done with records that cannot be used."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from mmpeft_fast.data.collate import Collator
from mmpeft_fast.data.sets.dataset import DataSet, Place, TaskSample
from mmpeft_fast.fields import at_least, check_value


class BadRecords:
    """Records that cannot be used: the first one is an error, or (skip) they are left out and kept as sentences."""

    def __init__(self, *, skip: bool = False) -> None:
        self.skip = skip
        self.sentences: list[str] = []

    def add(self, error: ValueError) -> None:
        """Raises the error, or keeps its sentence."""
        if not self.skip:
            raise error
        self.sentences.append(str(error))

    def __len__(self) -> int:
        return len(self.sentences)


def load_set(
    data_set: DataSet,
    root: str | Path,
    split: str,
    *,
    limit: int | None = None,
    seed: int = 42,
    bad: BadRecords | None = None,
) -> list[TaskSample]:
    """The samples of a split, each with an image whose header can be read.

    root: the folder of all data sets. limit: a random subset of that size; of one seed, a smaller subset is the
    beginning of a larger one. None takes all, in the order of the files. seed: also draws what a sample draws. bad:
    what to do with malformed records and images that are missing or no images; refuses them by default.

    Raises ValueError for a split that the set does not have, files that are missing or unreadable, a refused record,
    and fewer usable records than `limit`.
    """
    check_value("limit", limit, Annotated[int, at_least(1)] | None)
    root, bad = Path(root), BadRecords() if bad is None else bad
    if split not in data_set.splits:
        raise ValueError(f"{data_set.name}: expected a split of {', '.join(data_set.splits)}, got {split!r}")
    missing = data_set.missing(root, split)
    if missing:
        raise ValueError(
            f"{data_set.title} {split}: expected {', '.join(missing)} in {root}, found none; published at "
            f"{data_set.published}"
        )
    records = list(enumerate(data_set.records(root, split)))
    if limit is not None:
        random.Random(seed).shuffle(records)
    samples: list[TaskSample] = []
    images: set[Path | None] = set()  # whose headers have been read
    for index, (where, record) in records:
        if len(samples) == limit:
            break
        try:
            sample = _sample(data_set, record, Place(root, split, where, random.Random(f"{seed} {index}")))
            if sample.image not in images:
                sample.check_image()
                images.add(sample.image)
            samples.append(sample)
        except ValueError as error:
            bad.add(error)
    if len(samples) < (1 if limit is None else limit):
        wanted = "a usable record" if limit is None else f"{limit} usable records"
        raise ValueError(
            f"{data_set.title} {split}: expected {wanted} in {root}, found {len(samples)} among {len(records)}"
        )
    return samples


def _sample(data_set: DataSet, record: object, place: Place) -> TaskSample:
    try:
        return data_set.sample(record, place)
    except ValueError as error:
        raise ValueError(f"{place.where}: {str(error).removeprefix(f'{place.where}: ')}") from error


def decodable(samples: Iterable[TaskSample], bad: BadRecords) -> list[TaskSample]:
    """The samples whose images can be decoded to their last pixel; what several samples share is decoded once."""
    kept, decoded = [], {None}
    for sample in samples:
        try:
            if sample.image not in decoded:
                sample.load_image()
                decoded.add(sample.image)
            kept.append(sample)
        except ValueError as error:
            bad.add(error)
    return kept


def fitting(samples: Iterable[TaskSample], collator: Collator, bad: BadRecords) -> list[TaskSample]:
    """The samples that the collator takes whole: their images can be decoded and nothing lies behind its max_length."""
    whole = Collator(collator.processor, loss=collator.loss)
    kept = []
    for sample in samples:
        try:
            length = whole([sample])["input_ids"].shape[1]
            if collator.max_length is not None and length > collator.max_length:
                raise ValueError(f"{sample.source}: expected at most {collator.max_length} tokens, got {length}")
            kept.append(sample)
        except ValueError as error:
            bad.add(error)
    return kept

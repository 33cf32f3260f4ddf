"""Batches without padding: samples lie behind one another in one row, and what they begin with alike lies there once.

A data set asks many things of one image. The image's tokens and the text before the questions are the same in all of
these samples, and attention is causal, so their activations are too: computing them once is exact (`documents.py`).
"""

from collections.abc import Sequence
from typing import Any

import torch

from mmpeft_fast.contexts import LEAST_SHARED
from mmpeft_fast.data.collate import Collator
from mmpeft_fast.data.conversations import LEAST_BYTES, Sample
from mmpeft_fast.data.feature_store import FeatureStore
from mmpeft_fast.data.packing import Packing, Size
from mmpeft_fast.documents import Documents
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.patch_grids import mrope_positions, take_images

CONTEXTS = ("shared", "packed")


def why_not_packed(processor: Any) -> str | None:
    """Why samples of this processor cannot lie behind one another in a row, or None, as far as a processor shows it.
    Where there is a model its family says it (`Family.why_not_packed`)."""
    return "its images are found by rows" if hasattr(processor, "encode_chat") else None


class SharedContextCollator(Collator):
    """Turn samples into one row of documents: `SharedContextCollator(processor)(samples)`, for a fused model.

    context: "shared" puts what samples of one image (by content; samples without one likewise) begin with alike there
    once, "packed" leaves every sample whole. processor, max_length, multiple_of (of the row's length), loss and
    features: as of `Collator`.

    Raises:
        ValueError: as `Collator`, and for processors of models that find images by rows (Qwen-VL's).
    """

    def __init__(
        self,
        processor: Any,
        *,
        context: str = "shared",
        max_length: int | None = None,
        multiple_of: int = 1,
        loss: str = "publisher",
        features: FeatureStore | None = None,
    ) -> None:
        if context not in CONTEXTS:
            raise ValueError(f"context: expected one of {list(CONTEXTS)}, got {context!r}")
        reason = why_not_packed(processor)
        if reason is not None:
            raise ValueError(f"context: expected a model whose samples can share a row, but {reason}; use Collator")
        super().__init__(processor, max_length=max_length, multiple_of=multiple_of, loss=loss, features=features)
        self.context = context

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collate samples into a batch of one row of T tokens.

        Returns `input_ids`, `position_ids`, `labels`, `attention_mask` (1 but for padding to `multiple_of`) and what
        else the processor has of tokens, [1, T] int64 (position_ids [3, 1, T] where the model's tokens have three),
        `documents`, what the processor gives for the images, each once, and `supervised_capacity`. The loss and its
        gradients are those of the same samples in rows of their own. Raises ValueError as `Collator` does.
        """
        self.check(samples)
        rows, image_inputs = self._templated(samples)
        for sample, row in zip(samples, rows, strict=True):
            self._truncate(sample, row)
            row["labels"][0] = IGNORE_INDEX  # nothing precedes it
        positions = self._positions(rows, image_inputs.get("image_grid_thw"))
        groups = self._groups(samples) if self.context == "shared" else [[index] for index in range(len(samples))]
        with_image = [index for index, sample in enumerate(samples) if sample.image is not None]
        packed: dict[str, list[torch.Tensor]] = {name: [] for name in rows[0]}
        packed_positions: list[torch.Tensor] = []
        lengths: list[tuple[int, int]] = []
        images: list[int] = []

        def add(index: int, start: int, stop: int | None, parent: int) -> None:
            for name, parts in packed.items():
                parts.append(rows[index][name][start:stop])
            packed_positions.append(positions[index][..., start:stop])
            lengths.append((len(packed["labels"][-1]), parent))

        for members in groups:
            shared = self._shared(rows, members)
            context = len(lengths)
            if shared:
                add(members[0], 0, shared, -1)
            for index in members:
                add(index, shared, None, context if shared else -1)
            shown = members[:1] if shared else members
            images += [with_image.index(index) for index in shown if samples[index].image is not None]

        documents = Documents((tuple(lengths),))
        batch = self._pad([{name: torch.cat(parts) for name, parts in packed.items()}])
        position_ids = torch.cat(packed_positions, dim=-1)
        missing = batch["labels"].shape[1] - position_ids.shape[-1]
        batch["position_ids"] = torch.nn.functional.pad(position_ids, (0, missing))[..., None, :]
        if images != list(range(len(with_image))):
            image_inputs = take_images(image_inputs, images)
        capacity = max(1, int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()))
        return {**batch, **image_inputs, "documents": documents, "supervised_capacity": capacity}

    def _positions(self, rows: Sequence[dict], grids: torch.Tensor | None) -> list[torch.Tensor]:
        """Of each sample's row its tokens' positions [T]; [3, T] where the processor's images are grids of patches.
        Those of a shared beginning are the same in all of them.

        grids: [N, 3] of the samples with an image, in order.
        """
        merge_size = getattr(getattr(self.processor, "image_processor", None), "merge_size", None)
        if merge_size is None:
            return [torch.arange(len(row["input_ids"])) for row in rows]
        remaining, found = iter([] if grids is None else grids.tolist()), []
        for row in rows:
            is_image = self._is_image(row["input_ids"])
            found.append(mrope_positions(is_image, [next(remaining)] if is_image.any() else [], merge_size))
        return found

    def packing(self, samples: Sequence[Sample], budget: int) -> Packing:
        """As `Collator.packing`; samples of one image file share what comes before its end, where all begin alike."""
        if self.context == "packed":
            sizes = list(map(Size, self._lengths(samples)))
        else:
            sizes = self._sizes(samples)
        return Packing(sizes=tuple(sizes), budget=budget, multiple_of=self.multiple_of)

    def _sizes(self, samples: Sequence[Sample]) -> list[Size]:
        images = {sample.image: sample for sample in samples if sample.image is not None}
        # Of images of one content file beginnings and ends are the same too. The collator may put any of their samples
        # into one group, so all of them must begin alike for any of them to share.
        digests = {image: sample.image_digest(LEAST_BYTES) for image, sample in images.items()}
        numbers = {image: number for number, image in enumerate(digests)}
        beginnings: dict[str, set[tuple[int, ...]]] = {}
        sizes = []
        for sample, (ids, added) in zip(samples, self._ids_before_images(samples), strict=True):
            length = min(len(ids) + added, self.max_length or len(ids) + added)
            if sample.image is None:
                sizes.append(Size(length))
                continue
            context = int(self._is_image(torch.tensor(ids)).nonzero()[-1]) + 1
            beginnings.setdefault(digests[sample.image], set()).add(tuple(ids[:context]))
            sizes.append(Size(length, context + added, numbers[sample.image]))
        for index, sample in enumerate(samples):
            length, context, group = sizes[index]
            is_shared = sample.image is not None and len(beginnings[digests[sample.image]]) == 1
            if not (is_shared and LEAST_SHARED <= context < length):
                sizes[index] = Size(length, 0, group)
        return sizes

    def _groups(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Indices of the samples of each image, in the order in which images come first."""
        digests: dict[Any, str | None] = {}
        groups: dict[str | None, list[int]] = {}
        for index, sample in enumerate(samples):
            if sample.image not in digests:
                digests[sample.image] = None if sample.image is None else sample.image_digest()
            groups.setdefault(digests[sample.image], []).append(index)
        return list(groups.values())

    def _shared(self, rows: Sequence[dict], members: Sequence[int]) -> int:
        """How many tokens the members begin with alike and may share: every one keeps an unlabelled token of its own
        before its first label, which predicts it. 0 where that is too little, or would part an image."""
        if len(members) < 2:
            return 0
        ids = [rows[index]["input_ids"] for index in members]
        shared = min(map(len, ids)) - 1
        for other in ids[1:]:
            differs = (ids[0][:shared] != other[:shared]).nonzero()
            shared = min(shared, int(differs[0]) if len(differs) else shared)
        for index in members:
            labelled = (rows[index]["labels"] != IGNORE_INDEX).nonzero()
            shared = min(shared, int(labelled[0]) - 1 if len(labelled) else shared)
        if shared < LEAST_SHARED or any(self._is_image(row[shared:]).any() for row in ids):
            return 0
        return shared

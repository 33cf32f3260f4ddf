"""Batches of a few tokens: made for a model, or cut out of a real batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmpeft_fast.documents import Documents, not_targets
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.models.inputs import image_shape, least_length, special_tokens, training_batch

_LENGTH, _ROWS = 12, 2
_SEED = 0
# A square image of so many pixels is the smallest that families which take any size turn into several tokens.
_MERGED_PATCHES = 2


def made_batches(config: PretrainedConfig, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Two batches of random tokens on the CPU, always the same ones: two rows of text with padding on either side, so
    that attention needs its mask; and padding on the right alone, where it does not, with an image where the model
    takes one. A third of the tokens carry a label."""
    generator = torch.Generator().manual_seed(_SEED)
    text = _text_batch(config, _ROWS, generator)
    text["attention_mask"][0, :3] = 0
    text["attention_mask"][1, -2:] = 0
    text["labels"].masked_fill_(text["attention_mask"] == 0, IGNORE_INDEX)
    if hasattr(config, "visual") or hasattr(config, "vision_config"):
        right = _image_batch(config, dtype, generator)
    else:
        right = _text_batch(config, _ROWS, generator)
    right["attention_mask"][0, -2:] = 0
    right["labels"].masked_fill_(right["attention_mask"] == 0, IGNORE_INDEX)
    return [right, text]


def documents_batch(config: PretrainedConfig) -> dict[str, Any]:
    """A row of random tokens on the CPU, always the same ones: a context with two answers, a document for itself."""
    documents = Documents((((_LENGTH, -1), (_LENGTH // 2, 0), (_LENGTH // 3, 0), (_LENGTH // 2, -1)),))
    (length,) = documents.lengths
    ids = _random_tokens(config, (1, length), torch.Generator().manual_seed(_SEED))
    labels = ids.masked_fill(not_targets(documents, length, ids.device), IGNORE_INDEX)
    return {"input_ids": ids, "position_ids": documents.position_ids(), "labels": labels, "documents": documents}


def _random_tokens(config: PretrainedConfig, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    vocabulary = config.get_text_config().vocab_size
    special = special_tokens(config)
    visual = getattr(config, "visual", None)
    if visual is not None:  # Qwen-VL's markers of an image and what lies between them
        start = visual["image_start_id"] if isinstance(visual, Mapping) else visual.image_start_id
        special |= {start, start + 1, start + 2}
    usual = torch.tensor([token for token in range(min(vocabulary, 4096)) if token not in special])
    return usual[torch.randint(len(usual), shape, generator=generator)]


def _text_batch(config: PretrainedConfig, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = _random_tokens(config, (rows, _LENGTH), generator)
    labels = ids.clone()
    labels[:, : _LENGTH - _LENGTH // 3 - 2] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _image_batch(config: PretrainedConfig, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
    vision = getattr(config, "visual", None) or config.vision_config
    size = None
    if hasattr(vision, "spatial_merge_size"):
        size = _MERGED_PATCHES * vision.patch_size * vision.spatial_merge_size
    elif hasattr(config, "image_grid_pinpoints"):
        size = vision.image_size
    length = least_length(image_shape(config, size), 1) + _LENGTH
    batch = training_batch(
        config, lambda *sizes, dtype: torch.randn(*sizes, generator=generator).to(dtype), batch_size=1, seq_len=length,
        labelled=_LENGTH // 2, images=1, image_size=size, dtype=dtype,
    )  # fmt: skip
    ids, labels = batch["input_ids"], batch["labels"]
    is_text = ids == ids[0, 0]  # the first token is text, and all text is one token
    ids[is_text] = _random_tokens(config, (int(is_text.sum()),), generator)
    labels[labels != IGNORE_INDEX] = ids[labels != IGNORE_INDEX]
    return batch


def cut_batch(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A few tokens of a training batch. Of text alone two rows and as many columns as end behind the first labels; with
    images one whole row where it can be told which images are its, else the batch as it is."""
    batch = dict(batch)
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return batch
    names = [name for name, value in batch.items() if isinstance(value, Tensor) and value.shape == labels.shape]
    others = [name for name, value in batch.items() if isinstance(value, Tensor) and value.dim() and name not in names]
    scalars = {name: value for name, value in batch.items() if name not in names and name not in others}
    scalars.pop("supervised_capacity", None)  # of the whole batch; the cut one's is read from its labels
    if not others:
        return scalars | _cut_text({name: batch[name] for name in names}, labels)
    row = {name: batch[name][:1] for name in names}
    grid = batch.get("image_grid_thw")
    if grid is not None and len(grid) == len(labels) and set(others) == {"image_grid_thw", "pixel_values"}:
        return (
            scalars | row | {"image_grid_thw": grid[:1], "pixel_values": batch["pixel_values"][: int(grid[0].prod())]}
        )
    if grid is None and all(len(batch[name]) == len(labels) for name in others):
        return scalars | row | {name: batch[name][:1] for name in others}
    return batch


def _cut_text(tensors: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    rows = (labels != IGNORE_INDEX).any(1).nonzero().flatten()[:_ROWS]
    if not len(rows):
        return {name: tensor[:_ROWS, : 2 * _LENGTH] for name, tensor in tensors.items()}
    # A window with the first labels of the rows, whatever is before it: text without its beginning is text.
    first = int((labels[rows] != IGNORE_INDEX).int().argmax(1).max())
    end = min(labels.shape[1], first + _LENGTH // 2)
    start = max(0, end - 2 * _LENGTH)
    return {name: tensor[rows, start:end] for name, tensor in tensors.items()}

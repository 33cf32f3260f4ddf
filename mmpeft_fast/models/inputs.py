"""A training batch for a model of any family: real token ids, labels and image grids, placeholder pixels."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.models import family_for
from mmpeft_fast.models.images import ImageKind, ImageShape

_TEXT_TOKEN = 5


def image_shape(config: PretrainedConfig, image_size: int | None = None) -> ImageShape:
    """What an image of `image_size` pixels a side is to a model; its own size where that is fixed.

    Raises:
        ValueError: the model takes no images, or one size and another was asked for, or no patch would be left.
    """
    return _kind(config).shape(config, image_size)


def _kind(config: PretrainedConfig) -> ImageKind:
    kind = family_for(config.model_type, "configuration").image
    if kind is None:
        raise ValueError(f"images: {config.model_type} reads text alone; expected 0 images a sample")
    return kind


def num_supervised(seq_len: int, supervised_fraction: float) -> int:
    """Labelled tokens of a sample; at least one, and never the first, which nothing predicts."""
    return min(max(1, round(seq_len * supervised_fraction)), seq_len - 1)


def training_batch(
    config: PretrainedConfig,
    empty: Callable[..., Tensor],
    *,
    batch_size: int,
    seq_len: int,
    labelled: int,
    images: int,
    image_size: int | None,
    dtype: torch.dtype,
    within: int | None = None,
) -> dict[str, Tensor]:
    """The model's keyword arguments for `batch_size` samples of `seq_len` tokens without padding: text, `images` images
    each with a text token before it, text, and at the end the labelled tokens. within: the images end within so many
    tokens; None: anywhere.

    empty: makes the pixels: (*sizes, dtype=...) -> a tensor.

    Raises:
        ValueError: the images do not fit into the length.
    """
    shape = image_shape(config, image_size) if images else ImageShape(())
    needed = least_length(shape, images)
    within = seq_len if within is None else within
    if within < needed:
        raise ValueError(
            f"seq_len: expected at least {needed} tokens for {images} images of {len(shape.ids)} tokens, got {within}"
        )
    special = special_tokens(config) | set(shape.ids)
    text = next(token for token in range(_TEXT_TOKEN, _TEXT_TOKEN + len(special) + 1) if token not in special)
    ids = torch.full((batch_size, seq_len), text)
    for i in range(images):
        start = i * (len(shape.ids) + 1) + 1
        ids[:, start : start + len(shape.ids)] = torch.tensor(shape.ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, seq_len - labelled :] = text
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if not images:
        return batch
    pixels = functools.partial(empty, dtype=dtype)
    return batch | _kind(config).inputs(config, shape, batch_size * images, ids, pixels)


def least_length(shape: ImageShape, images: int) -> int:
    """The shortest sample with so many images: each with a text token before it, and a labelled token at the end."""
    return max(2, images * (len(shape.ids) + 1) + 1)


def special_tokens(config: PretrainedConfig) -> set[int]:
    """Token ids that a configuration names."""
    named = [value for name, value in config.to_dict().items() if name.endswith(("_token_id", "_token_index"))]
    return {token for value in named for token in (value if isinstance(value, list) else [value])}

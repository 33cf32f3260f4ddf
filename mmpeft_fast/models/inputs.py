"""A training batch for a model of any family: real token ids, labels and image grids, placeholder pixels."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

# Side of the square images of families that take any size: 256 tokens at a patch of 14 merged 2 x 2; what LLaVA-NeXT
# sees in four tiles.
DEFAULT_IMAGE_SIZE = 448
_SHRINK_ABOVE = 1.1  # LLaVA-OneVision's
_IGNORED = -100
_TEXT_TOKEN = 5


class ImageShape(NamedTuple):
    """What one image is to a decoder: its token ids in order, and its patches [rows, columns] where the family takes
    images of any size. side: its pixels where the family takes one size, or tiles of one size.
    tiles, image_size: how many tiles the tower sees, the whole image among them, and the pixels of the image."""

    ids: tuple[int, ...]
    grid: tuple[int, int] | None = None
    side: int | None = None
    tiles: int | None = None
    image_size: tuple[int, int] | None = None


def image_shape(config: PretrainedConfig, image_size: int | None = None) -> ImageShape:
    """What an image of `image_size` pixels a side is to a model; its own size where that is fixed.

    Raises:
        ValueError: the model takes no images, or one size and another was asked for, or no patch would be left.
    """
    vision = getattr(config, "visual", None) or getattr(config, "vision_config", None)
    if vision is None:
        raise ValueError(f"images: {config.model_type} reads text alone; expected 0 images a sample")
    if hasattr(config, "image_grid_pinpoints"):
        return _tiled_image(config, image_size or DEFAULT_IMAGE_SIZE)
    if hasattr(vision, "spatial_merge_size"):
        merge = vision.spatial_merge_size
        side = round((image_size or DEFAULT_IMAGE_SIZE) / (vision.patch_size * merge)) * merge
        if side < merge:
            raise ValueError(f"image_size: expected at least {vision.patch_size * merge} pixels, got {image_size}")
        return ImageShape((config.image_token_id,) * (side // merge) ** 2, grid=(side, side))
    if image_size not in (None, vision.image_size):
        raise ValueError(f"image_size: {config.model_type} takes {vision.image_size} pixels, got {image_size}")
    if hasattr(vision, "num_queries"):  # a resampler's features between start and end; ids: start, end, feature
        start = vision.image_start_id
        return ImageShape((start, *(start + 2,) * vision.num_queries, start + 1), side=vision.image_size)
    image_token = getattr(config, "image_token_id", None)
    image_token = config.image_token_index if image_token is None else image_token
    return ImageShape((image_token,) * config.image_seq_length, side=vision.image_size)


def _tiled_image(config: PretrainedConfig, side: int) -> ImageShape:
    """A square image, the only one of its sample, in LLaVA-NeXT and LLaVA-OneVision: features of the whole, then those
    of its tiles row by row, each row ended by a newline. OneVision shrinks the latter where they are more than so many
    whole images have (it does not tile several images of a sample; the plan does)."""
    tile, size = config.vision_config.image_size, (side, side)
    if side < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {side}")
    patches = tile // config.vision_config.patch_size
    tile_rows, tile_columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, tile)
    features = torch.empty(1, tile_rows * patches, tile_columns * patches, device="meta")
    _, rows, columns = unpad_image(features, size).shape
    most = getattr(config, "vision_aspect_ratio", None)
    if most is not None:
        ratio = math.sqrt(rows * columns / (int(most.removeprefix("anyres_max_")) * patches**2))
        if ratio > _SHRINK_ABOVE:
            rows, columns = int(rows // ratio), int(columns // ratio)
    ids = (config.image_token_id,) * (patches**2 + rows * (columns + 1))
    return ImageShape(ids, side=tile, tiles=1 + tile_rows * tile_columns, image_size=size)


def num_supervised(seq_len: int, supervised_fraction: float) -> int:
    """Labelled tokens of a sample; at least one, and never the first, which nothing predicts."""
    return min(max(1, round(seq_len * supervised_fraction)), seq_len - 1)


def training_batch(
    config: PretrainedConfig,
    empty: Callable[..., Tensor],
    *,
    batch_size: int,
    seq_len: int,
    supervised_fraction: float,
    images: int,
    image_size: int | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The model's keyword arguments for `batch_size` samples of `seq_len` tokens without padding: text, `images` images
    each with a text token before it, text, and at the end the supervised tokens.

    empty: makes the pixels: (*sizes, dtype=...) -> a tensor.

    Raises:
        ValueError: the images do not fit into the length.
    """
    shape = image_shape(config, image_size) if images else ImageShape(())
    needed = least_length(shape, images)
    if seq_len < needed:
        raise ValueError(
            f"seq_len: expected at least {needed} tokens for {images} images of {len(shape.ids)} tokens, got {seq_len}"
        )
    special = special_tokens(config) | set(shape.ids)
    text = next(token for token in range(_TEXT_TOKEN, _TEXT_TOKEN + len(special) + 1) if token not in special)
    ids = torch.full((batch_size, seq_len), text)
    for i in range(images):
        start = i * (len(shape.ids) + 1) + 1
        ids[:, start : start + len(shape.ids)] = torch.tensor(shape.ids)
    labels = torch.full_like(ids, _IGNORED)
    labels[:, seq_len - num_supervised(seq_len, supervised_fraction) :] = text
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    count = batch_size * images
    if not images:
        return batch
    if shape.tiles is not None:
        pixels = empty(count, shape.tiles, 3, shape.side, shape.side, dtype=dtype)
        return batch | {"pixel_values": pixels, "image_sizes": torch.tensor([shape.image_size] * count)}
    if shape.grid is None:
        return batch | {"pixel_values": empty(count, 3, shape.side, shape.side, dtype=dtype)}
    vision = config.vision_config
    patch = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    rows = count * shape.grid[0] * shape.grid[1]
    return batch | {
        "pixel_values": empty(rows, patch, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, *shape.grid]] * count),
        "mm_token_type_ids": (ids == shape.ids[0]).int(),
    }


def least_length(shape: ImageShape, images: int) -> int:
    """The shortest sample with so many images: each with a text token before it, and a labelled token at the end."""
    return max(2, images * (len(shape.ids) + 1) + 1)


def special_tokens(config: PretrainedConfig) -> set[int]:
    """Token ids that a configuration names."""
    named = [value for name, value in config.to_dict().items() if name.endswith(("_token_id", "_token_index"))]
    return {token for value in named for token in (value if isinstance(value, list) else [value])}

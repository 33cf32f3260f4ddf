"""What an image is to a model: one of five kinds, named by its family (`Family.image`).

Square      one size, one row of features                 LLaVA
Tiled       any size, as the whole and tiles of one size   LLaVA-NeXT, LLaVA-OneVision
Cropped     any size, as tiles of one size and the whole    InternVL
PatchGrid   any size, as rows of patches                   Qwen2-VL and later
Resampled   one size, a fixed number of features           Qwen-VL
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

# Side of the square images of families that take any size: 256 tokens at a patch of 14 merged 2 x 2; what LLaVA-NeXT
# sees in four tiles.
DEFAULT_IMAGE_SIZE = 448
_SHRINK_ABOVE = 1.1  # LLaVA-OneVision's
_MOST_TILES = 12  # InternVL's


class ImageShape(NamedTuple):
    """What one image is to a decoder: its token ids in order, and its patches [rows, columns] where the family takes
    images of any size. side: its pixels where the family takes one size, or tiles of one size.
    tiles, image_size: how many tiles the tower sees, the whole image among them, and the pixels of the image."""

    ids: tuple[int, ...]
    grid: tuple[int, int] | None = None
    side: int | None = None
    tiles: int | None = None
    image_size: tuple[int, int] | None = None


class ImageKind(Protocol):
    """How a family takes an image."""

    def shape(self, config: PretrainedConfig, image_size: int | None) -> ImageShape:
        """What a square image of `image_size` pixels a side is; of the usual size where None. Raises ValueError where
        the model takes another size only, or no patch would be left."""
        ...

    def inputs(
        self, config: PretrainedConfig, shape: ImageShape, count: int, ids: Tensor, empty: Callable[..., Tensor]
    ) -> dict[str, Tensor]:
        """The model's keyword arguments for `count` images of this shape.

        ids: the batch's token ids [B, T]; empty: makes pixels, (*sizes) -> a tensor.
        """
        ...


def _only_size(config: PretrainedConfig, own: int, image_size: int | None) -> int:
    if image_size not in (None, own):
        raise ValueError(f"image_size: {config.model_type} takes {own} pixels, got {image_size}")
    return own


class Square:
    """One size; its features stand for as many image tokens."""

    def shape(self, config, image_size):
        side = _only_size(config, config.vision_config.image_size, image_size)
        token = getattr(config, "image_token_id", None)
        token = config.image_token_index if token is None else token
        return ImageShape((token,) * config.image_seq_length, side=side)

    def inputs(self, config, shape, count, ids, empty):
        return {"pixel_values": empty(count, 3, shape.side, shape.side)}


class Resampled:
    """One size; a fixed number of features between a start and an end token, made by a resampler's queries."""

    def shape(self, config, image_size):
        vision = config.visual
        side = _only_size(config, vision.image_size, image_size)
        start = vision.image_start_id  # the end's and the feature's follow it
        return ImageShape((start, *(start + 2,) * vision.num_queries, start + 1), side=side)

    inputs = Square.inputs


class Tiled:
    """Features of the whole image, then those of its tiles row by row, each row ended by a newline. OneVision shrinks
    the latter where they are more than so many whole images have (it does not tile several images of a sample; the plan
    does)."""

    def shape(self, config, image_size):
        side = image_size or DEFAULT_IMAGE_SIZE
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

    def inputs(self, config, shape, count, ids, empty):
        pixels = empty(count, shape.tiles, 3, shape.side, shape.side)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([shape.image_size] * count)}


class Cropped:
    """Tiles of one size, as many as come closest to the image's form, then the whole where there are several; all of
    them are images to the model."""

    def shape(self, config, image_size):
        tile, _ = config.vision_config.image_size
        side = image_size or tile
        if side < 1:
            raise ValueError(f"image_size: expected at least 1 pixel, got {side}")
        columns, rows = get_optimal_tiled_canvas((side, side), (tile, tile), 1, _MOST_TILES)
        tiles = rows * columns + (rows * columns > 1)
        return ImageShape((config.image_token_id,) * config.image_seq_length * tiles, side=tile, tiles=tiles)

    def inputs(self, config, shape, count, ids, empty):
        return {"pixel_values": empty(count * shape.tiles, 3, shape.side, shape.side)}


class PatchGrid:
    """Rows of patches, merged to fewer features."""

    def shape(self, config, image_size):
        vision = config.vision_config
        merge = vision.spatial_merge_size
        side = round((image_size or DEFAULT_IMAGE_SIZE) / (vision.patch_size * merge)) * merge
        if side < merge:
            raise ValueError(f"image_size: expected at least {vision.patch_size * merge} pixels, got {image_size}")
        return ImageShape((config.image_token_id,) * (side // merge) ** 2, grid=(side, side))

    def inputs(self, config, shape, count, ids, empty):
        vision = config.vision_config
        patch = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
        return {
            "pixel_values": empty(count * shape.grid[0] * shape.grid[1], patch),
            "image_grid_thw": torch.tensor([[1, *shape.grid]] * count),
            "mm_token_type_ids": (ids == shape.ids[0]).int(),
        }

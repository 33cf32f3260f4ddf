"""Images as grids of patches (Qwen2-VL and later), whose inputs lie behind one another and whose tokens have three
positions each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def mrope_positions(is_image: Tensor, grids: Iterable[Sequence[int]], merge_size: int) -> Tensor:
    """[3, T] int64, the time, height and width of a row's tokens (mRoPE: Wang et al. 2024, Qwen2-VL, section 2.1).

    Text counts on by one in all three. An image's tokens count from where the text before it ended, each along its own
    dimension of the grid; the text behind it goes on after the longer of its sides. A token's positions depend on
    nothing behind it.

    Args:
        is_image: [T] bool, which tokens stand for image features.
        grids: frames, rows and columns of patches of each of the row's images, in order.
        merge_size: patches along a side of what one token stands for.

    Raises:
        ValueError: as many image tokens as the grids have are not there.
    """
    grids = [(frames, rows // merge_size, columns // merge_size) for frames, rows, columns in grids]
    places = is_image.nonzero().flatten().tolist()
    expected = sum(frames * rows * columns for frames, rows, columns in grids)
    if len(places) != expected:
        raise ValueError(f"image tokens: expected {expected} for grids {grids}, got {len(places)}")
    parts, done, position, seen = [], 0, 0, 0
    for frames, rows, columns in grids:
        start = places[seen]
        parts.append((position + torch.arange(start - done)).expand(3, -1))
        position += start - done
        sides = map(torch.arange, (frames, rows, columns))
        parts.append(position + torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1))
        position += max(rows, columns)
        count = frames * rows * columns
        done, seen = start + count, seen + count
    parts.append((position + torch.arange(len(is_image) - done)).expand(3, -1))
    return torch.cat(parts, dim=1)


def split_images(inputs: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """Images' inputs image by image.

    inputs: tensors or lists whose first dimension is the images. Beside `image_grid_thw` [N, 3] that of `pixel_values`
    is the patches, one image's behind another's.
    """
    sizes = {}
    if inputs.get("image_grid_thw") is not None:
        sizes["pixel_values"] = inputs["image_grid_thw"].prod(1).tolist()
    return {
        name: value.split(sizes.get(name, 1)) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }


def take_images(inputs: Mapping[str, Any], images: Sequence[int]) -> dict[str, Any]:
    """Of images' inputs (`split_images`) those of these images, in this order."""
    chosen = {name: [parts[image] for image in images] for name, parts in split_images(inputs).items()}
    return {
        name: torch.cat([value[:0], *chosen[name]]) if isinstance(value, Tensor) else chosen[name]
        for name, value in inputs.items()
    }

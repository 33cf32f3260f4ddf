"""Positions of images that are grids of patches, against transformers' own, and images' inputs one by one."""

import pytest
import torch

from mmpeft_fast.patch_grids import mrope_positions, split_images, take_images
from tests.tiny_models import tiny_model

GRIDS = [(1, 4, 6), (1, 8, 2), (3, 2, 4)]  # of patches, merged 2 x 2


def row_of(grids, texts):
    """[T] bool: text of so many tokens before, between and behind the images."""
    parts = [torch.zeros(texts[0], dtype=torch.bool)]
    for grid, text in zip(grids, texts[1:], strict=True):
        parts += [torch.ones(torch.tensor(grid).prod() // 4, dtype=torch.bool), torch.zeros(text, dtype=torch.bool)]
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("grids, texts", [([], [5]), (GRIDS, [3, 1, 2, 4]), (GRIDS[1:2], [0, 0])])
def test_positions_are_the_models_own(family, grids, texts):
    is_image = row_of(grids, texts)
    model = tiny_model(family).model
    ids = torch.where(is_image, model.config.image_token_id, 5)
    expected, _ = model.get_rope_index(
        ids[None], mm_token_type_ids=is_image.int()[None], image_grid_thw=torch.tensor(grids).reshape(-1, 3)
    )
    assert torch.equal(mrope_positions(is_image, grids, 2), expected[:, 0])


def test_images_that_are_not_there():
    with pytest.raises(ValueError, match=r"image tokens: expected 6 for grids \[\(1, 2, 3\)\], got 5"):
        mrope_positions(torch.ones(5, dtype=torch.bool), GRIDS[:1], 2)


def test_images_one_by_one():
    grids = torch.tensor(GRIDS)
    patches = torch.arange(int(grids.prod(1).sum()))
    inputs = {"pixel_values": patches, "image_grid_thw": grids, "named": ["a", "b", "c"]}
    parts = split_images(inputs)
    assert [len(part) for part in parts["pixel_values"]] == [24, 16, 24]
    taken = take_images(inputs, [2, 0, 2])
    assert torch.equal(taken["pixel_values"], torch.cat([patches[40:], patches[:24], patches[40:]]))
    assert taken["named"] == ["c", "a", "c"] and torch.equal(taken["image_grid_thw"], grids[[2, 0, 2]])
    squares = take_images({"pixel_values": torch.eye(3)}, [])
    assert squares["pixel_values"].shape == (0, 3)

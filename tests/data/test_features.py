"""Kept features: rows and image inputs are those of the processor, whether an image was met before or not."""

import pytest
import torch

from mmpeft_fast.data import FEATURES, Collator, train_tokenizer
from mmpeft_fast.data.feature_store import FeatureStore
from mmpeft_fast.models import FAMILIES, tiny_processor

WITH = [name for name, family in FAMILIES.items() if family.image_features]


@pytest.mark.parametrize("family", WITH)
def test_batches_are_those_of_the_processor(family, samples, tmp_path):
    processor = tiny_processor(family, train_tokenizer(samples, FAMILIES[family].special_tokens))
    store = FeatureStore(tmp_path, "revision")
    expected = Collator(processor)(samples)
    collator = Collator(processor, features=store)
    for is_kept in (False, True):
        batch = collator(samples)
        images = batch.pop(FEATURES)
        assert [("output" in image) for image in images] == [is_kept] * 2
        assert batch.keys() == expected.keys() - {"pixel_values"}
        for name, value in batch.items():
            assert torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]
            assert getattr(value, "dtype", None) == getattr(expected[name], "dtype", None)
        if not is_kept:
            numbers = (batch["input_ids"] == processor.image_token_id).sum(1).tolist()
            for image, number in zip(images, numbers, strict=False):
                store.write(image["key"], {"features": torch.zeros(number, 4)} | image["others"])

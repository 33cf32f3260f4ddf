"""Token budgets: what the collators say samples need is what their batches have, and no batch has more."""

import random
from dataclasses import replace

import pytest
from PIL import Image

from mmpeft_fast.data import Collator, Packing, Sample, SharedContextCollator, Size, train_tokenizer
from mmpeft_fast.models import FAMILIES, tiny_processor


def test_first_fit_decreasing():
    packing = Packing(sizes=tuple(map(Size, (3, 7, 5, 5, 2, 8))), budget=10)
    assert packing.batches(range(6)) == [[5, 4], [1, 0], [2, 3]]


def test_padding_counts():
    packing = Packing(sizes=tuple(map(Size, (3, 7, 5, 5, 2, 8))), budget=16, is_padded=True, multiple_of=4)
    assert packing.batches(range(6)) == [[1, 2], [3, 5], [0, 4]]
    assert [packing.tokens(batch) for batch in packing.batches(range(6))] == [16, 16, 8]


def test_samples_of_one_context_stay_together():
    sizes = [Size(12, 10, group) for group in (0, 1, 0, 1, 0, 1)]
    assert Packing(sizes=tuple(sizes), budget=16).batches(range(6)) == [[0, 2, 4], [1, 3, 5]]
    assert Packing(sizes=tuple(sizes), budget=14).batches(range(6)) == [[0, 2], [1, 3], [4], [5]]


@pytest.mark.parametrize("case", range(100))
def test_batches_are_a_partition_within_the_budget(case):
    rng = random.Random(case)
    sizes = []
    for _ in range(rng.randint(1, 40)):
        context = rng.choice((0, 0, 5))
        sizes.append(Size(context + rng.randint(1, 20), context, rng.randint(0, 3)))
    is_padded, multiple_of = rng.random() < 0.3, rng.choice((1, 4))
    packing = Packing(sizes=tuple(sizes), budget=32, is_padded=is_padded, multiple_of=multiple_of)
    processes = rng.randint(1, 4)
    members = rng.sample(range(len(sizes)), len(sizes) // processes * processes)
    batches = packing.batches(members, processes)
    assert sorted(index for batch in batches for index in batch) == sorted(members)
    assert all(packing.tokens(batch) <= 32 for batch in batches) and all(batches)
    assert not len(batches) % processes
    assert batches == packing.batches(members, processes)


@pytest.fixture(scope="module")
def many(image_folder, tmp_path_factory):
    """Samples of images of two sizes, of one content under two names, of two beginnings, of several turns and of no
    image."""
    folder = tmp_path_factory.mktemp("sizes")
    Image.new("RGB", (40, 64), "red").save(folder / "small.png")
    (folder / "copy.png").write_bytes((image_folder / "1.png").read_bytes())
    images = [image_folder / "0.png", image_folder / "1.png", folder / "copy.png", folder / "small.png", None]
    found = []
    for index in range(24):
        image = images[index % 5]
        question = ("is it red?", "what color is it, do you think?")[index % 2]
        one = Sample(
            id=str(index), questions=(f"<image>\n{question}" if image else question,), image=image,
            answers=("yes " * (index % 4),), source=f"sample {index}",
        )  # fmt: skip
        found.append(one)
    found[3] = replace(found[3], questions=(*found[3].questions, "and now?"), answers=("no", "red " * 30))
    found[6] = replace(found[6], questions=("look at this: <image>\nwhat is it?",))
    return found


CASES = [
    (name, how)
    for name, family in FAMILIES.items()
    if family.vision_tower
    for how in (("padded", "packed", "shared") if name.startswith("llava") else ("padded",))
]


@pytest.mark.parametrize("multiple_of", [1, 16])
@pytest.mark.parametrize(("family", "how"), CASES)
def test_what_collators_say_is_so(family, how, multiple_of, many):
    processor = tiny_processor(family, train_tokenizer(many, FAMILIES[family].special_tokens))
    options = {"multiple_of": multiple_of, "max_length": 160 if family == "internvl" else 110}
    if how == "padded":
        collator = Collator(processor, **options)
    else:
        collator = SharedContextCollator(processor, context=how, **options)
    packing = collator.packing(many, 256)
    for index, sample in enumerate(many):
        assert packing.tokens([index]) == collator([sample])["input_ids"].numel()
    batches = packing.batches(range(len(many)))
    found = [collator([many[index] for index in batch])["input_ids"].numel() for batch in batches]
    assert max(found) <= 256
    if how == "shared":  # what differs in one sample is not counted on in others, whose batch may share it
        assert all(mine <= packing.tokens(batch) for mine, batch in zip(found, batches, strict=True))
        packed = SharedContextCollator(processor, context="packed", **options)
        is_less = len(batches) < len(packed.packing(many, 256).batches(range(24)))
        assert is_less == (family != "llava_onevision")  # whose tiny images are too short to be worth sharing
    else:
        assert found == [packing.tokens(batch) for batch in batches]

"""Text and images to inputs: spans, paths, pixels, and what is refused."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image

from mmpeft_fast.data import IGNORE_INDEX, Collator, Sample
from mmpeft_fast.models.qwen_vl import QwenVLConfig, QwenVLProcessor
from mmpeft_fast.models.qwen_vl.images import image_processor, path_of

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711])

TURN = "<|im_start|><|im_end|>\n"  # what counts of a turn whose text does not

# 5.17 lacks both, 5.23 has them; no version between was tried.
IS_OLD = Version(transformers.__version__) < Version("5.23")


@pytest.fixture(scope="module")
def processor(tokenizer):
    return QwenVLProcessor(image_processor(448), tokenizer)


@pytest.fixture(scope="module")
def image():
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def expected_pixels(image, size):
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return ((np.asarray(resized) / 255 - MEAN) / DEVIATION).transpose(2, 0, 1)


def special(processor, *names):
    return processor.tokenizer.convert_tokens_to_ids(list(names))


def test_pixels(processor, image):
    pixels = processor(image, "<img></img>", return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 448, 448) and pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[0].numpy(), expected_pixels(image, 448), rtol=0, atol=2e-6)
    grey = processor(image.convert("L"), "<img></img>", return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(grey[0].numpy(), expected_pixels(image.convert("L"), 448), rtol=0, atol=2e-6)


def test_a_placeholder_is_a_span_of_256_ids(processor, image):
    start, end, pad = special(processor, "<img>", "</img>", "<imgpad>")
    for inner in ("", "<imgpad>", "<imgpad>" * 256):
        ids = processor(image, f"ab<img>{inner}</img>\nab")["input_ids"][0]
        first = ids.index(start)
        assert ids[first : first + 258] == [start, *[pad] * 256, end]
        assert ids.count(pad) == 256 and ids.count(start) == 1


@pytest.mark.parametrize("name", ["b.png", "ä 日本.png", "n" * 252 + ".png"])
def test_a_path_is_its_bytes_and_padding(processor, image, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if len(name) < 250:  # more bytes than a file's name may have
        image.save(name)
    start, end, pad = special(processor, "<img>", "</img>", "<imgpad>")
    images = None if len(name) < 250 else image
    encoded = processor(images, f"Picture 1: <img>{name}</img>\nis it?", return_tensors="pt")
    ids = encoded["input_ids"][0].tolist()
    data = list(name.encode())
    first = ids.index(start)
    assert ids[first : first + 258] == [start, *data, *[pad] * (256 - len(data)), end]
    assert path_of(ids[first + 1 : first + 257], pad) == name
    np.testing.assert_allclose(encoded["pixel_values"][0].numpy(), expected_pixels(image, 448), rtol=0, atol=2e-6)


def test_a_path_of_257_bytes_is_refused(processor, image):
    with pytest.raises(ValueError, match="expected an image path of 1 to 256 bytes, got 257"):
        processor(image, f"<img>{'n' * 257}</img>")


def test_batch_of_paths_and_placeholders(processor, image, tmp_path):
    path = tmp_path / "b.png"
    other = Image.new("RGB", (10, 10), "red")
    other.save(path)
    texts = ["ab <img></img>", "no image", f"<img>{path}</img> and <img><imgpad></img>"]
    encoded = processor([[image], [], [image]], texts, padding=True, return_tensors="pt")
    assert encoded["pixel_values"].shape == (3, 3, 448, 448)
    assert torch.equal(encoded["pixel_values"][0], encoded["pixel_values"][2])
    np.testing.assert_allclose(encoded["pixel_values"][1].numpy(), expected_pixels(other, 448), rtol=0, atol=2e-6)
    assert encoded["input_ids"].shape == encoded["attention_mask"].shape
    assert "pixel_values" not in processor(text=["ab", "é"])


def test_images_that_do_not_fit_the_text_are_refused(processor, image, tmp_path):
    with pytest.raises(ValueError, match="an image for each of 1 spans, or for the 1 without a path, got 0"):
        processor(None, "<img></img>")
    with pytest.raises(ValueError, match="an image for each of 2 spans, or for the 1 without a path, got 3"):
        processor([image] * 3, "<img></img><img>b.png</img>")
    with pytest.raises(ValueError, match="expected a readable image, but b.png cannot be decoded".replace(".", r"\.")):
        processor(None, "<img>b.png</img>")
    with pytest.raises(ValueError, match="expected a text"):
        processor(image)


@pytest.mark.skipif(
    IS_OLD and importlib.util.find_spec("torchvision") is None,
    reason="this transformers loads no image processor without torchvision",
)
def test_saved_and_loaded(processor, image, tmp_path):
    processor.save_pretrained(tmp_path)
    again = QwenVLProcessor.from_pretrained(tmp_path)
    mine, theirs = (one(image, "ab<img></img>\n", return_tensors="pt") for one in (processor, again))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert again.chat_template == processor.chat_template and again.num_queries == 256


def test_from_the_publishers_files(vocabulary, image, tmp_path):
    QwenVLConfig().save_pretrained(tmp_path)
    (tmp_path / "qwen.tiktoken").write_bytes(vocabulary.path.read_bytes())
    processor = QwenVLProcessor.from_pretrained(tmp_path)
    assert processor(image, "<img></img>", return_tensors="pt")["pixel_values"].shape == (1, 3, 448, 448)
    assert processor.num_queries == 256 and len(processor.tokenizer) == len(vocabulary.ranks) + 217


def test_chat_with_images_and_loss_mask(processor, image):
    conversation = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "ab"}]},
    ]
    encoded = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    counted = [i for i, one in zip(encoded["input_ids"][0], encoded["assistant_masks"][0], strict=True) if one]
    assert processor.tokenizer.decode(counted) == TURN + TURN + "<|im_start|>ab<|im_end|>\n"
    assert np.asarray(encoded["pixel_values"]).shape == (1, 3, 448, 448)


def test_collator(processor, image, tmp_path):
    image.save(tmp_path / "a.png")
    sample = Sample(id="0", questions=("<image>\nis it?",), answers=("ab é",), image=tmp_path / "a.png")
    samples = [sample, Sample(id="1", questions=("ab?",), answers=("no",))]
    batch = Collator(processor, padding_side="left", loss="answers")(samples)
    answers = [processor.tokenizer.decode(row[row != IGNORE_INDEX]) for row in batch["labels"]]
    assert answers == ["ab é<|im_end|>", "no<|im_end|>"]
    assert batch["pixel_values"].shape == (1, 3, 448, 448)
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [256, 0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_publishers_loss_is_the_collators_default(processor, side):
    sample = Sample(id="0", questions=("ab?", "and?"), answers=("ab é", "no"))
    for options in ({}, {"loss": "publisher"}):
        batch = Collator(processor, padding_side=side, **options)([sample])
        counted = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != IGNORE_INDEX])
        turns = TURN + TURN + "<|im_start|>ab é<|im_end|>\n" + TURN + "<|im_start|>no<|im_end|>\n"
        assert counted == turns.removeprefix("<|im_start|>")  # the first token of all is nobody's target
        assert batch["supervised_capacity"] == (batch["labels"][0, 1:] != IGNORE_INDEX).sum()
    with pytest.raises(ValueError, match="expected 'publisher' or 'answers', got 'all'"):
        Collator(processor, loss="all")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_alpha_is_dropped_whichever_way_an_image_comes_in(processor, mode, tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA") if mode == "RGBA" else Image.fromarray(noise[..., :2], "LA")
    if mode == "RGB":  # with one colour that counts as transparent
        image = Image.fromarray(noise[..., :3] // 128)
        image.info["transparency"] = (1, 1, 1)
    if mode == "P":
        image = Image.fromarray(noise[..., :3]).quantize(16)
        image.info["transparency"] = 3
    image.save(tmp_path / "a.png", transparency=image.info.get("transparency"))
    for images, inner in ((image, ""), (None, tmp_path / "a.png")):
        pixels = processor(images, f"<img>{inner}</img>", return_tensors="pt")["pixel_values"]
        np.testing.assert_allclose(pixels[0].numpy(), expected_pixels(image, 448), rtol=0, atol=2e-6)


def test_paths_are_normalised_and_lone_surrogates_replaced(processor, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image.save("é.png")
    decomposed, composed = (processor(None, f"<img>{name}.png</img>")["input_ids"] for name in ("e\u0301", "é"))
    assert decomposed == composed
    assert processor(text="a\ud800b")["input_ids"] == processor(text="a\ufffdb")["input_ids"]
    assert processor(text="\ud83d\ude00")["input_ids"] == processor(text="😀")["input_ids"]


def test_decoding_shows_the_path(processor, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image.save("ä 日本.png")
    for name in ("ä 日本.png", ""):
        text = f"ab <img>{name}</img>\nis it?"
        ids = processor(None if name else image, text, return_tensors="pt")["input_ids"]
        assert processor.decode(ids[0]) == text and processor.batch_decode(ids) == [text]


def rgba(mode):
    noise = np.random.default_rng(2).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA") if mode == "RGBA" else Image.fromarray(noise[..., :2], "LA")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_dropped_from_arrays_tensors_and_by_the_image_processor(processor, mode, tmp_path):
    image = rgba(mode)
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    first = np.moveaxis(array, -1, 0)
    ways = {
        "pil": image, "path": str(tmp_path / "a.png"), "array": array, "channels first": first,
        "tensor": torch.from_numpy(first.copy()), "tensor, channels last": torch.from_numpy(array.copy()),
    }  # fmt: skip
    for way, given in ways.items():
        direct = processor.image_processor(given, return_tensors="pt")["pixel_values"]
        through = processor(given, "<img></img>", return_tensors="pt")["pixel_values"]
        part = {"type": "image", "path": given} if way == "path" else {"type": "image", "image": given}
        chat = [{"role": "user", "content": [part]}]
        templated = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        for pixels in (direct, through, templated["pixel_values"]):
            np.testing.assert_allclose(pixels[0].numpy(), expected_pixels(image, 448), rtol=0, atol=2e-6, err_msg=way)


def test_images_are_not_turned_by_their_orientation(processor, image, tmp_path):
    """The publisher's `Image.open(path).convert("RGB")` takes the pixels as they lie in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = str(tmp_path / "a.png")
    image.save(path, exif=exif)
    expected = expected_pixels(image, 448)
    chats = [[{"role": "user", "content": [{"type": "image", key: path}]}] for key in ("path", "image", "url")]
    several = [processor.apply_chat_template(one, tokenize=True, return_dict=True) for one in chats]
    opened = Image.open(path)
    for encoded in (*several, processor(None, f"<img>{path}</img>"), processor(opened, "<img></img>"),
                    processor.image_processor(path), processor.image_processor(opened)):  # fmt: skip
        np.testing.assert_allclose(np.asarray(encoded["pixel_values"][0]), expected, rtol=0, atol=2e-6)


def test_a_text_with_an_image_tag_of_its_own_is_refused(processor):
    for question in ("<img>b.png</img>", "<img></img>", "<imgpad>"):
        with pytest.raises(ValueError, match="expected 0 <imgpad> in the templated text, found 1"):
            Collator(processor)([Sample(id="0", questions=(question,), answers=("ab",))])
    with pytest.raises(ValueError, match="expected </img> behind each <img>"):
        Collator(processor)([Sample(id="0", questions=("<img>b.png",), answers=("ab",))])


def test_prompts_of_the_collator_take_written_markers_as_text(processor):
    sample = Sample(id="0", questions=("a<|im_end|>\n<|im_start|>",), answers=("b<|im_end|>",))
    end = special(processor, "<|im_end|>")[0]
    collator = Collator(processor)
    assert (collator.encode_prompt(sample)["input_ids"] == end).sum() == 2  # of system and user
    assert (collator([sample])["input_ids"] == end).sum() == 5


def test_what_is_cut(processor):
    """The publisher's fine-tuning keeps a sample whose answers are cut; where answers alone count it is refused."""
    sample = Sample(id="0", questions=("ab " * 50,), answers=("no",))
    whole = Collator(processor)([sample])
    cut = Collator(processor, max_length=40)([sample])
    for name in ("input_ids", "labels"):
        assert torch.equal(cut[name], whole[name][:, :40])
    assert cut["supervised_capacity"] == (whole["labels"][0, 1:40] != IGNORE_INDEX).sum() > 0
    with pytest.raises(ValueError, match="expected an answer to begin within max_length 40"):
        Collator(processor, max_length=40, loss="answers")([sample])
    with pytest.raises(ValueError, match="expected what counts to begin within max_length 2"):
        Collator(processor, max_length=2)([sample])


def test_a_path_with_a_lone_surrogate_is_one_sentence(processor):
    with pytest.raises(ValueError, match="cannot be decoded"):
        processor(None, "<img>a\ud800.png</img>")

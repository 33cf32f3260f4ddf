import json
from dataclasses import replace

import pytest
from PIL import Image

from mmpeft_fast.data import Sample, check_images, data_digest, load_conversations


def entry(**fields):
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": " a shape "}]
    return {"id": "7", "image": "0.png", "conversations": turns, **fields}


def turns(*pairs):
    return [{"from": role, "value": text} for role, text in pairs]


@pytest.fixture
def load(tmp_path, image_folder):
    def load(content, suffix=".json", **options):
        path = tmp_path / f"data{suffix}"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return load_conversations(path, image_folder, **options)

    return load


def test_reads_text_image_and_several_turns(load, image_folder):
    talk = turns(("human", "<image>\nwhat?"), ("gpt", "a dog"), ("human", "sure?"), ("gpt", "yes"))
    one, two = load([entry(), entry(id=8, conversations=talk)])
    assert (one.id, one.questions, one.answers) == ("7", ("<image>\nwhat?",), ("a shape",))
    assert one.image == image_folder / "0.png"
    assert (two.id, two.questions, two.answers) == ("8", ("<image>\nwhat?", "sure?"), ("a dog", "yes"))
    assert one.load_image().getpixel((0, 0)) == (255, 0, 0)


def test_messages_keep_the_place_of_the_image(load):
    (sample,) = load([entry(conversations=turns(("human", "look <image> here"), ("gpt", "ok")))])
    kinds = [(part["type"], part.get("text")) for part in sample.messages()[0]["content"]]
    assert kinds == [("text", "look"), ("image", None), ("text", "here")]


def test_image_is_optional_and_limit_takes_the_first(load):
    plain = {"conversations": turns(("human", "hi"), ("gpt", "hello"))}
    samples = load([plain, plain, entry(image="missing.png")], limit=2)
    assert [(sample.id, sample.image) for sample in samples] == [("0", None), ("1", None)]


def test_json_lines(load):
    lines = json.dumps(entry()) + "\n\n" + json.dumps(entry(id="8")) + "\n"
    assert [sample.id for sample in load(lines, ".jsonl")] == ["7", "8"]
    with pytest.raises(ValueError, match=r"data\.jsonl line 3: expected valid JSON"):
        load(lines.replace('"8"', '"8'), ".jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("[" * 100_000, "expected JSON of few levels, it is nested too deep"),
        (f"[{'9' * 5000}]", "expected valid JSON, but Exceeds the limit"),
        ([entry(conversations=turns(("human", "<image> \ud800"), ("gpt", "a")))], "half a surrogate pair"),
        ("[]", "expected at least one conversation"),
        ('[{"id": ', r"expected valid JSON, but .* at line 1 column 9"),
        ({"id": "7"}, "expected a JSON list of conversations, got an object with 'id'"),
        (["text"], r"entry 0: expected an object with id, image and conversations, got 'text'"),
        ([entry(), entry(conversations=[])], r"entry 1 \(id '7'\): expected 'conversations' .* got an empty list"),
        ([entry(conversations="hi")], r"expected 'conversations' to be a non-empty list of turns, got 'hi'"),
        ([entry(conversations=turns(("human", "<image>")))], "answered by a gpt turn, got no gpt turn"),
        (
            [entry(conversations=turns(("human", "<image>"), ("gpt", "a"), ("human", "b")))],
            "a last human turn without answer",
        ),
        ([entry(conversations=turns(("gpt", "a"), ("human", "b")))], "turn 0: expected turns to alternate"),
        ([entry(conversations=turns(("human", "<image>"), ("robot", "b")))], "turn 1: expected role .* got 'robot'"),
        (
            [entry(conversations=turns(("human", "<image>"), ("gpt", " ")))],
            "turn 1: expected 'value' to be a non-empty",
        ),
        ([entry(conversations=[{"from": "human"}])], "turn 0: expected an object with 'from' and 'value'"),
        ([entry(image="missing.png")], r"\(id '7'\): expected the image file .*missing.png, found none"),
        ([entry(image=["0.png", "1.png"])], "expected 'image' to be one relative path, got a list of 2"),
        ([entry(image=None)], "expected 0 <image> in the first human turn because it has no 'image', got 1"),
        (
            [entry(conversations=turns(("human", "what?"), ("gpt", "a")))],
            "expected 1 <image> in the first human turn because it has an 'image', got 0",
        ),
        (
            [entry(conversations=turns(("human", "<image>"), ("gpt", "a"), ("human", "<image>"), ("gpt", "b")))],
            "expected <image> only in the first human turn",
        ),
    ],
)
def test_bad_entries_are_named(load, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(content)
    assert "data.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/hostname", "../0.png", "a/../../0.png"])
def test_images_outside_the_folder_are_refused(load, name):
    with pytest.raises(ValueError, match=r"entry 0 \(id '7'\): expected 'image' inside the image folder, got "):
        load([entry(image=name)])
    with pytest.raises(ValueError, match="expected the image file"):
        load([entry(image="/no/such.png")], images_anywhere=True)


def test_the_digest_tells_order_text_and_images_apart(load, image_folder, tmp_path):
    samples = load([entry(), entry(id=8, image="1.png"), entry(image="2.png")])
    digests = {data_digest(each) for each in (samples, samples[::-1], samples[:2])}
    digests.add(data_digest([replace(samples[0], answers=("other",)), *samples[1:]]))
    (tmp_path / "copy.png").write_bytes((image_folder / "0.png").read_bytes())
    assert data_digest([replace(samples[0], image=tmp_path / "copy.png", id="x"), *samples[1:]]) in digests
    (tmp_path / "copy.png").write_bytes((image_folder / "1.png").read_bytes())
    digests.add(data_digest([replace(samples[0], image=tmp_path / "copy.png"), *samples[1:]]))
    assert len(digests) == 5


def test_text_alone_needs_no_folder(load, tmp_path):
    load([{"conversations": turns(("human", "hi"), ("gpt", "hello"))}])
    assert load_conversations(tmp_path / "data.json")[0].image is None
    load([entry()])
    with pytest.raises(ValueError, match=r"entry 0 \(id '7'\): expected no 'image', as no image folder was given, got"):
        load_conversations(tmp_path / "data.json")


def test_bad_paths_are_named(load, tmp_path, image_folder):
    with pytest.raises(ValueError, match="found no such file"):
        load_conversations(tmp_path / "none.json", image_folder)
    load([entry()])
    with pytest.raises(ValueError, match="expected the folder of the images"):
        load_conversations(tmp_path / "data.json", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="limit: expected at least 1 sample, got 0"):
        load([entry()], limit=0)
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(ValueError, match="expected a readable UTF-8 text file"):
        load_conversations(tmp_path / "latin.json", image_folder)


def test_unreadable_images_are_named(load, image_folder):
    (image_folder / "text.png").write_text("no image")
    whole = (image_folder / "0.png").read_bytes()
    (image_folder / "short.png").write_bytes(whole[: len(whole) // 2])
    text, short = load([entry(id="text", image="text.png"), entry(id="short", image="short.png")])
    for sample in (text, short):
        with pytest.raises(ValueError, match=rf"\(id '{sample.id}'\): expected a readable image"):
            sample.load_image()
    with pytest.raises(ValueError, match=r"\(id 'text'\)"):
        check_images([short, text])
    check_images([short])  # its header is whole; only decoding tells


def test_one_changed_bit_anywhere_in_an_image_is_another_data_set(tmp_path):
    path = tmp_path / "a.bmp"
    Image.new("RGB", (200, 200)).save(path)
    sample = Sample(id="0", questions=("<image>\nwhat?",), answers=("yes",), image=path)
    content = bytearray(path.read_bytes())
    digests = {data_digest([sample])}
    for place in (0, len(content) // 2, len(content) - 1):
        path.write_bytes(bytes([*content[:place], content[place] ^ 1, *content[place + 1 :]]))
        digests.add(data_digest([sample]))
    assert len(digests) == 4

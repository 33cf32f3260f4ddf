import importlib.util
import json

import pytest

from mmpeft_fast.data import easy_vqa_conversations, load_conversations

ANSWERS = {
    "circle",
    "green",
    "red",
    "gray",
    "yes",
    "teal",
    "black",
    "rectangle",
    "yellow",
    "triangle",
    "brown",
    "blue",
    "no",
}


def test_converts_to_conversations_the_loader_takes(tmp_path):
    path, images = easy_vqa_conversations(tmp_path, "train", limit=300, seed=1)
    samples = load_conversations(path, images)
    assert len(samples) == len({sample.id for sample in samples}) == 300
    assert {answer for sample in samples for answer in sample.answers} <= ANSWERS
    assert all(q.endswith("Answer the question using a single word or phrase.") for s in samples for q in s.questions)
    assert samples[0].load_image().size == (64, 64)


def test_is_done_once_and_redone_if_damaged(tmp_path):
    request = {"limit": 20, "seed": 3}
    path, _ = easy_vqa_conversations(tmp_path, "test", **request)
    text, stamp = path.read_text(), path.stat().st_mtime_ns
    assert easy_vqa_conversations(tmp_path, "test", **request)[0].stat().st_mtime_ns == stamp

    path.write_text(text[: len(text) // 2])
    assert easy_vqa_conversations(tmp_path, "test", **request)[0].read_text() == text
    manifest = path.with_suffix(".manifest.json")
    manifest.unlink()
    easy_vqa_conversations(tmp_path, "test", **request)
    assert json.loads(manifest.read_text())["size"] == 20
    assert sorted(tmp_path.iterdir()) == sorted([path, manifest])


def test_seed_and_split_decide_the_subset(tmp_path):
    def ids(split, seed):
        path, images = easy_vqa_conversations(tmp_path, split, limit=10, seed=seed)
        return [sample.id for sample in load_conversations(path, images)]

    assert ids("train", 1) == ids("train", 1)
    assert len({tuple(ids("train", 1)), tuple(ids("train", 2)), tuple(ids("test", 1))}) == 3


def test_bad_requests(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected split 'train' or 'test', got 'val'"):
        easy_vqa_conversations(tmp_path, "val")
    with pytest.raises(ValueError, match="expected a limit of 1 to 38575"):
        easy_vqa_conversations(tmp_path, "train", limit=0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run: pip install easy-vqa"):
        easy_vqa_conversations(tmp_path, "train")
    assert list(tmp_path.iterdir()) == []

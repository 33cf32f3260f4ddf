"""Features on disk: whole or not there, whoever writes, dies or clears at the same time."""

import multiprocessing
import os
import random
import time

import pytest
import torch

from mmpeft_fast.data import FeatureStore

BYTES = 4096 * 4  # of one entry's tensor


def entry(number):
    return {"features": torch.full((64, 64), float(number)), "image_sizes": torch.tensor([[number, 2]])}


def same(found, number):
    return found.keys() == entry(number).keys() and all(torch.equal(found[k], v) for k, v in entry(number).items())


def test_what_is_written_is_read(tmp_path):
    store = FeatureStore(tmp_path / "a" / "b", "first")
    assert store.read(store.key("x")) is None
    store.write(store.key("x"), entry(1))
    store.write(store.key("x"), entry(1))
    assert same(FeatureStore(tmp_path / "a" / "b", "first").read(store.key("x")), 1)
    other = FeatureStore(tmp_path / "a" / "b", "second")
    assert other.key("x") != store.key("x") and other.read(other.key("x")) is None
    assert store.key("x", "y") != store.key("y", "x")


def test_the_longest_unread_go_first(tmp_path):
    store = FeatureStore(tmp_path, "", most_bytes=10 * BYTES)
    keys = [store.key(str(number)) for number in range(30)]
    for number, key in enumerate(keys):
        store.write(key, entry(number))
        time.sleep(0.002)
        assert same(store.read(keys[0]), 0)  # read again and again
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10 * BYTES
    left = [number for number, key in enumerate(keys) if store.read(key) is not None]
    assert left[0] == 0 and left[1:] == list(range(31 - len(left), 30)) and len(left) > 6


def test_what_is_open_outlives_its_file(tmp_path):
    store = FeatureStore(tmp_path, "")
    store.write(store.key("x"), entry(7))
    found = store.read(store.key("x"))
    (path,) = tmp_path.iterdir()
    path.unlink()
    assert same(found, 7) and store.read(store.key("x")) is None


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 100, b"cut"])
def test_damaged_files_are_as_none(content, tmp_path):
    store = FeatureStore(tmp_path, "")
    store.write(store.key("x"), entry(7))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1] if content == b"cut" else content)
    assert store.read(store.key("x")) is None and not list(tmp_path.iterdir())


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="most_bytes: expected an integer of at least 1, got 0"):
        FeatureStore(tmp_path, "", most_bytes=0)


def work(folder, seed, count):
    rng = random.Random(seed)
    store = FeatureStore(folder, "", most_bytes=20 * BYTES)
    for _ in range(count):
        number = rng.randrange(40)
        found = store.read(store.key(str(number)))
        if found is None:
            store.write(store.key(str(number)), entry(number))
        else:
            assert same(found, number)


def test_several_processes_and_kills(tmp_path):
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    for round_ in range(6):
        killed = [context.Process(target=work, args=(tmp_path, 10 * round_ + index, 10**6)) for index in range(2)]
        ends = context.Process(target=work, args=(tmp_path, round_, 60))
        for process in (*killed, ends):
            process.start()
        ends.join()
        time.sleep(rng.uniform(0, 0.05))
        for process in killed:
            process.kill()
            process.join()
        assert ends.exitcode == 0 and {process.exitcode for process in killed} == {-9}
    work(tmp_path, 99, 100)
    FeatureStore(tmp_path, "")  # clears what the killed ones have left
    names = os.listdir(tmp_path)
    assert names and not [name for name in names if name.startswith(".")]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20 * BYTES * (1 + 3 / 32) + BYTES

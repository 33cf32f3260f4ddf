"""Runs killed at random moments: what is left is whole, and the next run clears the rest and ends as if nothing was."""

import json
import multiprocessing
import random
import time

import pytest

from mmpeft_fast.train import TrainConfig, train
from mmpeft_fast.train.log import LOG

CONFIG = TrainConfig(learning_rate=1e-2, global_batch_size=4, batch_size=2, max_steps=8, save_every=1)


def pytest_generate_tests(metafunc):
    if "num_kills" in metafunc.fixturenames:
        metafunc.parametrize("num_kills", [100 if metafunc.config.getoption("--nightly") else 4])


@pytest.mark.filterwarnings("ignore")
def test_killed_at_random_moments(num_kills, make_model, samples, collator, tmp_path):
    def run(output):
        options = {"output": output, "resume": True, "cpu": True, "progress": False}
        return train(make_model(0.3), CONFIG, samples, collator, **options)

    started = time.perf_counter()
    expected = run(tmp_path / "whole").losses
    elapsed_s = time.perf_counter() - started
    rng, killed_at_work, left_over = random.Random(0), 0, set()
    runs = 0
    while killed_at_work < num_kills:
        output = tmp_path / f"run{runs}"
        for _ in range(3):  # killed again and again in one folder
            child = multiprocessing.get_context("fork").Process(target=run, args=(output,))
            child.start()
            while child.is_alive() and not output.exists():
                time.sleep(0.001)
            time.sleep(rng.uniform(0, elapsed_s))
            alive = child.is_alive()
            killed_at_work += alive
            elapsed_s *= 1.0 if alive else 0.8  # the machine was busier when it was measured
            child.kill()
            child.join()
            if output.exists():
                left_over |= {path.name.split(".")[1] for path in output.iterdir() if path.name.startswith(".")} - {
                    "lock"
                }
        run(output)
        assert {path.name for path in output.iterdir()} == {"checkpoint-000007", "checkpoint-000008", LOG}
        assert [json.loads(line)["loss"] for line in (output / LOG).read_text().splitlines()] == expected
        runs += 1
        assert runs < 10 + num_kills
    assert left_over or num_kills < 50  # so many kills leave something to clear

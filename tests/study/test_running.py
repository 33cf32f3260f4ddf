"""Cells that are stopped, that run in several processes, and on a Ray cluster: the same results."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from mmpeft_fast.study.base import build_base
from mmpeft_fast.study.cells import BaseSpec
from mmpeft_fast.study.in_turn import InTurn
from mmpeft_fast.study.inputs import prepare_inputs
from mmpeft_fast.study.on_ray import OnRay
from mmpeft_fast.study.process import Job, run_job
from mmpeft_fast.study.progress import Progress
from mmpeft_fast.study.recipes.recipe import Data, RecipeCell

CELL = "mmpeft_fast.study.recipes.cell"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny LLaVA that has not been trained, on disk."""
    folder = tmp_path_factory.mktemp("base") / "base"
    inputs = prepare_inputs(data=None, images=None, eval_samples=8)
    spec = BaseSpec(model="tiny-llava", data="easy-vqa", pretrain_steps=0, tower_epochs=0, seed=42)
    build_base(spec, inputs, eval_samples=8, threads=1, folder=folder)
    return str(folder)


def job_of(base: str, folder: Path, *, processes: int = 1, shard: bool = False, steps: int = 6) -> Job:
    data = Data(name="easy-vqa-color", split="train", limit=24)
    cell = RecipeCell(
        model="tiny-llava", labels={"model": "tiny-llava"}, method="lora", settings={"r": 4, "dropout": 0.0}, data=data,
        evaluations=(Data(name="easy-vqa-yes-no", split="test", limit=6),), dtype="fp32", evaluate_every=0.5,
        training={"batch_size": 4, "global_batch_size": 4, "max_steps": steps, "learning_rate": 1e-3},
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    spec = {
        "spec": asdict(cell), "base": base, "datasets": "", "folder": str(folder), "threads": 1, "device": "cpu",
        "shard": shard, "refuse_bad_records": False,
    }  # fmt: skip
    return Job(module=CELL, spec=spec, log=folder / "log", threads=processes, processes=processes)


RESULTS = ("steps", "loss_first", "loss_last", "scores", "trainable_params")


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory) -> dict:
    outcome = run_job(job_of(base, tmp_path_factory.mktemp("whole")))
    assert outcome["status"] == "success", outcome
    return outcome


def losses_in(folder: Path) -> list[float]:
    (log,) = folder.glob("train-*/train_log.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def killed_after(folder: Path, step: int):
    """A tick that kills all processes of a job, as kill -9 does, once it has a checkpoint of this step."""

    def tick() -> None:
        if list(folder.glob(f"train-*/checkpoint-{step:06d}")):
            for process in processes_of(folder):
                os.kill(process, signal.SIGKILL)

    return tick


def processes_of(folder: Path, *, rank: int | None = None) -> list[int]:
    """Those that run the cell of a folder, torchrun's own among them where no rank is asked for."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        is_rank = rank is None or f"RANK={rank}".encode() in environment.split(b"\0")
        if f'{folder}"'.encode() in words and CELL.encode() in words and is_rank:
            found.append(int(process.name))
    return found


def test_a_killed_cell_goes_on_bit_by_bit(base, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("mmpeft_fast.study.process.POLL_SECONDS", 0.01)
    outcome = run_job(job_of(base, tmp_path), killed_after(tmp_path, 2))
    assert "ended by SIGKILL" in outcome["reason"] and len(losses_in(tmp_path)) < 6
    outcome = run_job(job_of(base, tmp_path))
    assert {name: outcome[name] for name in RESULTS} == {name: expected[name] for name in RESULTS}


@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_compute_what_one_does_and_either_goes_on_in_the_other(
    base, expected, tmp_path, shard, monkeypatch
):
    monkeypatch.setattr("mmpeft_fast.study.process.POLL_SECONDS", 0.01)
    two = run_job(job_of(base, tmp_path / "two", processes=2, shard=shard))
    assert two["status"] == "success", (tmp_path / "two" / "log").read_text()[-3000:]
    assert two["scores"] == expected["scores"]
    for name in ("loss_first", "loss_last"):
        assert two[name] == pytest.approx(expected[name], rel=1e-4)

    run_job(job_of(base, tmp_path / "changed", processes=2, shard=shard), killed_after(tmp_path / "changed", 2))
    one = run_job(job_of(base, tmp_path / "changed"))
    assert one["status"] == "success", (tmp_path / "changed" / "log").read_text()[-3000:]
    assert one["loss_last"] == pytest.approx(expected["loss_last"], rel=1e-4)
    assert one["steps"] == 6


def test_a_process_that_dies_is_an_error_and_no_hang(base, tmp_path):
    job = job_of(base, tmp_path, processes=2, steps=2000)
    seen = []

    def tick() -> None:
        if not seen and list(tmp_path.glob("train-*/train_log.jsonl")):
            seen.extend(processes_of(tmp_path, rank=1))
            for process in seen:
                os.kill(process, signal.SIGKILL)

    started = time.monotonic()
    outcome = run_job(job, tick)
    assert seen and outcome["status"] == "failed" and time.monotonic() - started < 120


def test_without_ray_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"--ray: expected the package ray, which is missing; pip install"):
        OnRay(None, gpus=0)


class FakeRay:
    """Tasks of a cluster with two workers, of which the first is lost once."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self):
        self.options, self.results, self.cancelled = [], {}, []

    def is_initialized(self):
        return True

    def remote(self, **options):
        self.options.append(options)

        class Task:
            @staticmethod
            def remote(job, _self=self):
                _self.results[job.spec["number"]] = job
                return job.spec["number"]

        return lambda function: Task

    def wait(self, tasks, timeout):
        return [tasks[-1]], tasks[:-1]

    def get(self, task):
        if task == 1:
            raise self.exceptions.RayError("worker died\nand more")
        return {"status": "success", "number": task, "elapsed_s": 2.0}

    def cancel(self, task, force):
        self.cancelled.append(task)


def test_what_ray_is_asked_and_what_comes_back(monkeypatch, tmp_path):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    jobs = [
        (f"cell {n}", Job(module="m", spec={"number": n}, log=tmp_path / "log", threads=2, processes=2))
        for n in range(3)
    ]
    ended = list(OnRay("auto", gpus=0.5).run(jobs, Progress(["cell"] * 3)))
    assert fake.options == [{"num_cpus": 2, "num_gpus": 1.0, "max_retries": 3}] * 3
    assert [each.index for each in ended] == [2, 1, 0]
    assert ended[0].outcome == {"status": "success", "number": 2} and ended[0].elapsed_s == 2.0
    assert ended[1].outcome == {"status": "failed", "reason": "lost by Ray in 4 tries: RayError: worker died"}
    stopped = OnRay("auto", gpus=0).run(jobs, Progress(["cell"] * 3))
    next(stopped)
    stopped.close()
    assert fake.cancelled == [0, 1]


def test_a_cluster_of_two_workers_and_the_loss_of_one(base, expected, tmp_path):
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        jobs = [(str(n), job_of(base, tmp_path / str(n))) for n in range(2)]
        runner = OnRay(None, gpus=0).run(jobs, Progress(["cell"] * 2))
        killer = subprocess.Popen([sys.executable, "-c", KILL_A_WORKER, str(tmp_path)])
        ended = {each.index: each.outcome for each in runner}
        assert killer.wait() == 0
    finally:
        ray.shutdown()
    alone = {
        each.index: each.outcome for each in InTurn().run([("0", job_of(base, tmp_path / "a"))], Progress(["cell"]))
    }
    for outcome in (*ended.values(), *alone.values()):
        assert {name: outcome[name] for name in RESULTS} == {name: expected[name] for name in RESULTS}


# Kills the worker whose cell has written a checkpoint first.
KILL_A_WORKER = """
import os, signal, sys, time
from pathlib import Path
while True:
    for path in Path(sys.argv[1]).glob("*/train-*/checkpoint-*"):
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if str(path.parents[1]).encode() in words and b"recipes.cell" in words:
                stat = (process / "stat").read_text().rpartition(")")[2].split()
                os.kill(int(stat[1]), signal.SIGKILL)
                sys.exit(0)
    time.sleep(0.02)
"""

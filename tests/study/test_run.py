"""The run as a whole, with faked jobs: rows, skipping, failures, interruption."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mmpeft_fast import cli
from mmpeft_fast.study import in_turn
from mmpeft_fast.study import run as run_module
from mmpeft_fast.study.cells import StudyConfig, plan
from mmpeft_fast.study.command import _config
from mmpeft_fast.study.rows import CELLS, RESULTS_NAME, read_rows
from mmpeft_fast.study.run import MEASURED, newest_rows, run_study
from tests.study.conftest import FakeJobs


def stored(config) -> list[dict]:
    return [json.loads(line) for line in (config.output / RESULTS_NAME).read_text().splitlines()]


def test_one_complete_row_a_cell(config, rows):
    assert stored(config) == rows
    assert [row["spec_key"] for row in rows] == [cell.key for cell in plan(config)[1]]
    asked = {
        "model",
        "method",
        "implementation",
        "status",
        "trainable_params",
        "total_params",
        "tokens_per_step",
        "supervised_tokens_per_step",
        "step_ms_p50",
        "tokens_per_s",
        "peak_mib",
        "saved_mib",
        "loss_first",
        "loss_last",
        "accuracy",
        "seed",
        "device",
        "versions",
    }
    for row in rows:
        assert asked <= row.keys()
        missing = [name for name in MEASURED if row[name] is None]
        assert missing == ([] if row["status"] == "success" else list(MEASURED))
    assert (rows[0]["loss_first"], rows[0]["loss_last"]) == (2.0, 1.0)
    assert rows[0]["tokens_per_s"] == 900 / 10.0 * 1e3


def test_a_second_run_skips_what_succeeded_and_tries_the_rest_again(config, jobs, rows):
    jobs.names.clear()
    again = run_study(config)
    assert jobs.names == ["tiny-qwen2-vl ia3 peft"]
    by_key = {row["spec_key"]: row for row in stored(config)}
    assert [by_key[row["spec_key"]] for row in again] == again and len(by_key) == len(again)
    jobs.fail.clear()
    assert all(row["status"] == "success" for row in run_study(config))
    jobs.names.clear()
    run_study(config)
    assert jobs.names == []


def test_redo_runs_cells_again_but_keeps_the_bases(config, jobs, rows):
    jobs.names.clear()
    run_study(replace(config, redo=True))
    assert len(jobs.names) == len(rows) == len(stored(config))
    assert "tiny-llava" not in jobs.names


def test_a_failed_cell_is_a_row_and_not_the_end(rows):
    failed = [row for row in rows if row["status"] == "failed"]
    assert [(row["method"], row["implementation"]) for row in failed] == [("ia3", "peft")]
    assert failed[0]["reason"] == "ValueError: expected <this>, got that"
    assert rows[-1]["status"] == "success"


def test_a_failed_base_fails_its_models_cells_only(config, jobs):
    jobs.fail["tiny-llava"] = "MemoryError"
    rows = run_study(config)
    assert {row["status"] for row in rows if row["model"] == "tiny-qwen2-vl"} == {"success"}
    assert {row["reason"] for row in rows if row["model"] == "tiny-llava"} == {"no base model: MemoryError"}


def test_after_an_interrupt_the_same_run_goes_on(config, jobs):
    jobs.interrupt_at = "tiny-llava ia3 peft"
    with pytest.raises(KeyboardInterrupt, match="3 of 10 cells are done"):
        run_study(config)
    assert [row["status"] for row in stored(config)] == ["success"] * 3 + ["cancelled"]
    jobs.interrupt_at = None
    jobs.names.clear()
    assert len(run_study(config)) == 10
    assert len(jobs.names) == 7
    assert len(stored(config)) == 10


def test_every_command_measures_its_own_row(rows):
    """The command of a row, parsed by the command line, plans that very cell."""
    for row in rows:
        program, *words = shlex.split(row["command"])
        assert program == "mmpeft-fast"
        config = _config(cli._parser(words).parse_args(words))
        assert config.redo
        assert [cell.key for cell in plan(config)[1]] == [row["spec_key"]]


def test_rows_of_other_settings_stay_and_the_newest_is_shown(config, rows):
    changed = run_study(replace(config, steps=5, models=("tiny-llava",), methods=("lora",)))
    kept = read_rows(config.output)
    assert len(kept) == len(rows) + len(changed)
    for row in kept:  # all were made within one second
        row["time"] = "2030" if row["steps"] == 5 else "2020"
    newest = newest_rows(kept)
    assert len(newest) == len(rows)
    assert [row["steps"] for row in newest[:3]] == [5, 5, 5]
    names = [(row["model"], row["method"], row["implementation"]) for row in newest]
    assert names == [(row["model"], row["method"], row["implementation"]) for row in rows]


@pytest.mark.parametrize("text", ["{half a row", '{"status": "success"}', "[1]", ""])
def test_a_broken_row_is_set_aside_and_named_and_its_cell_runs_again(config, jobs, rows, text, capsys):
    jobs.names.clear()
    jobs.fail.clear()
    path = config.output / CELLS / f"{rows[1]['spec_key']}.json"
    path.write_text(text)
    again = run_study(config)
    assert jobs.names == ["tiny-llava lora peft", "tiny-qwen2-vl ia3 peft"]
    assert path.with_name(path.name + ".corrupt").read_text() == text
    assert f"set aside: {path}: expected" in capsys.readouterr().err
    assert all(row["status"] == "success" for row in again)


def test_memory_that_runs_out_is_a_status_of_its_own(config, jobs, capsys):
    jobs.oom = "tiny-llava lora fused"
    (row,) = (row for row in run_study(config) if row["status"] != "success")
    assert (row["status"], row["model"], row["implementation"]) == ("oom", "tiny-llava", "fused")
    assert "oom: tiny-llava lora fused: MemoryError" in capsys.readouterr().err


def test_too_few_conversations_are_refused_before_anything_is_written(config, jobs):
    with pytest.raises(ValueError, match=r"at least 26 conversations.*got 24"):
        run_study(replace(config, eval_samples=13))
    assert not config.output.exists()


class TogetherJobs(FakeJobs):
    """Cells of one process, of which so many end before the process does."""

    def __init__(self, ended: int):
        super().__init__()
        self.ended = ended

    def __call__(self, job, tick=lambda: None) -> dict:
        if "specs" not in job.spec:
            return super().__call__(job, tick)
        job = job.spec
        for number in range(min(self.ended, len(job["specs"]))):
            outcome = {"status": "success", "losses": [2.0, 1.0], "accuracy": 0.5, "elapsed_s": 1.5}
            (Path(job["folder"]) / f"{number}.json").write_text(json.dumps(outcome))
            tick()
        died = self.ended < len(job["specs"])
        return {"status": "failed", "reason": "the process was ended by SIGKILL"} if died else {"status": "success"}


def fake_jobs(monkeypatch, jobs: FakeJobs) -> None:
    monkeypatch.setattr(run_module, "run_job", jobs)
    monkeypatch.setattr(in_turn, "run_fitting", jobs)


def test_cells_of_one_process_are_kept_as_they_end_and_the_rest_told(tmp_path, monkeypatch):
    config = StudyConfig(
        output=tmp_path, models=("tiny-llava",), methods=("lora",), implementations=("fused",), axes=("location",)
    )
    fake_jobs(monkeypatch, TogetherJobs(ended=2))
    rows = run_study(config)
    assert [row["status"] for row in rows] == ["success", "success", "success", "failed"]
    assert rows[3]["reason"] == "the process was ended by SIGKILL" and rows[1]["elapsed_s"] == 1.5
    assert (rows[1]["loss_last"], rows[1]["accuracy"], rows[1]["step_ms_p50"], rows[1]["tokens_per_s"]) == (
        1.0, 0.5, None, None
    )  # fmt: skip
    fake_jobs(monkeypatch, TogetherJobs(ended=1))
    assert [row["status"] for row in run_study(config)] == ["success"] * 4


def test_the_commonest_answer_is_a_row_without_a_model(tmp_path, monkeypatch):
    config = StudyConfig(
        output=tmp_path, models=("tiny-llava",), methods=("lora",), implementations=("frozen",), axes=("task",)
    )
    fake_jobs(monkeypatch, TogetherJobs(ended=9))
    accuracy = {row["value"]: row["accuracy"] for row in run_study(config) if row["implementation"] == "majority"}
    assert 0.05 < accuracy["unseen"] < 0.25 and 0.25 < accuracy["seen"] < 0.45

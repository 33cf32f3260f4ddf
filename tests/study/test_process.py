"""Jobs in processes of their own: what they answer, and how their deaths are told."""

import json
import sys
import threading
import time

import pytest

from mmpeft_fast.study.process import child_main, run_job


def run_module(monkeypatch, tmp_path, source: str, tick=lambda: None, job=None) -> dict:
    """Runs `source` as a job's module."""
    (tmp_path / "a_job.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return run_job("a_job", job or {}, log_path=tmp_path / "job.log", threads=3, offline=True, tick=tick)


ANSWER = """
import json, os, sys
job = json.loads(sys.argv[sys.argv.index("--spec") + 1])
print("to the log")
answer = {"status": "ok", "job": job, "threads": os.environ["OMP_NUM_THREADS"], "hub": os.environ["HF_HUB_OFFLINE"]}
open(sys.argv[sys.argv.index("--out") + 1], "w").write(json.dumps(answer))
"""


def test_a_jobs_outcome_comes_back_and_its_words_go_to_the_log(monkeypatch, tmp_path):
    outcome = run_module(monkeypatch, tmp_path, ANSWER, job={"a": "ü"})
    assert outcome == {"status": "ok", "job": {"a": "ü"}, "threads": "3", "hub": "1"}
    assert (tmp_path / "job.log").read_text() == "to the log\n"


@pytest.mark.parametrize(
    "source, told",
    [
        ("import sys; sys.exit(3)", "ended early with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by SIGKILL, perhaps for lack of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
    ],
)
def test_a_death_is_an_outcome(monkeypatch, tmp_path, source, told):
    outcome = run_module(monkeypatch, tmp_path, source)
    assert outcome["status"] == "failed"
    assert told in outcome["reason"] and str(tmp_path / "job.log") in outcome["reason"]


def test_an_interrupt_ends_the_running_job(monkeypatch, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_module(monkeypatch, tmp_path, "import time; time.sleep(60)", tick=interrupt)
    assert time.monotonic() - started < 30
    assert threading.active_count() >= 1


@pytest.mark.parametrize(
    "error, reason",
    [
        (ValueError("rank: expected 1. More words\nmore lines"), "ValueError: rank: expected 1"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_the_jobs_end_turns_an_exception_into_a_reason(monkeypatch, tmp_path, capsys, error, reason):
    def work(job):
        raise error

    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["job", "--spec", "{}", "--out", str(out)])
    assert child_main(work) == 0
    assert json.loads(out.read_text()) == {"status": "failed", "reason": reason}
    assert "Traceback" in capsys.readouterr().err


def test_the_jobs_end_passes_the_spec_in_and_the_fields_out(monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["job", "--spec", '{"n": 2}', "--out", str(out)])
    assert child_main(lambda job: {"twice": 2 * job["n"]}) == 0
    assert json.loads(out.read_text()) == {"status": "ok", "twice": 4}

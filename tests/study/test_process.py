"""Jobs in processes of their own: what they answer, and how their deaths are told."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mmpeft_fast.study.process import Job, child_main, run_fitting, run_job


def run_module(monkeypatch, tmp_path, source: str, tick=lambda: None, job=None) -> dict:
    """Runs `source` as a job's module."""
    (tmp_path / "a_job.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return run_job(Job(module="a_job", spec=job or {}, log=tmp_path / "job.log", threads=3), tick)


ANSWER = """
import json, os, sys
job = json.loads(sys.argv[sys.argv.index("--spec") + 1])
print("to the log")
answer = {"status": "success", "job": job}
answer |= {"threads": os.environ["OMP_NUM_THREADS"], "hub": os.environ["HF_HUB_OFFLINE"]}
open(sys.argv[sys.argv.index("--out") + 1], "w").write(json.dumps(answer))
"""


def test_a_jobs_outcome_comes_back_and_its_words_go_to_the_log(monkeypatch, tmp_path):
    outcome = run_module(monkeypatch, tmp_path, ANSWER, job={"a": "ü"})
    assert outcome == {"status": "success", "job": {"a": "ü"}, "threads": "3", "hub": "1"}
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
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "RuntimeError: DefaultCPUAllocator: can't"),
    ],
)
def test_the_jobs_end_turns_an_exception_into_a_reason(monkeypatch, tmp_path, capsys, error, reason):
    def work(job):
        raise error

    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["job", "--spec", "{}", "--out", str(out)])
    assert child_main(work) == 0
    outcome = json.loads(out.read_text())
    assert outcome["status"] == ("failed" if isinstance(error, ValueError) else "oom")
    assert outcome["reason"].startswith(reason)
    assert "Traceback" in capsys.readouterr().err


def test_the_jobs_end_passes_the_spec_in_and_the_fields_out(monkeypatch, tmp_path):
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["job", "--spec", '{"n": 2}', "--out", str(out)])
    assert child_main(lambda job: {"twice": 2 * job["n"]}) == 0
    assert json.loads(out.read_text()) == {"status": "success", "twice": 4}


HUNGRY = """
import json, sys
job = json.loads(sys.argv[sys.argv.index("--spec") + 1])
answer = {"status": "oom" if job["micro_batch"] > 3 else "success", "reason": "no memory", "ran": job["micro_batch"]}
open(sys.argv[sys.argv.index("--out") + 1], "w").write(json.dumps(answer))
"""


@pytest.mark.parametrize("micro_batch, status, ran", [(16, "success", 2), (3, "success", 3)])
def test_a_job_out_of_memory_runs_with_half(monkeypatch, tmp_path, micro_batch, status, ran):
    (tmp_path / "a_job.py").write_text(HUNGRY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = Job(module="a_job", spec={}, log=tmp_path / "log", threads=1, micro_batch=micro_batch)
    outcome = run_fitting(job)
    assert (outcome["status"], outcome["ran"]) == (status, ran)


PARENT = """
import sys
from pathlib import Path
from mmpeft_fast.study.process import Job, run_job
run_job(Job(module="a_child", spec={}, log=Path(sys.argv[1]) / "log", threads=1))
"""
CHILD = """
import os, sys, time
from pathlib import Path
from mmpeft_fast.study.process import child_main
def work(job):
    (Path(__file__).parent / "pid").write_text(str(os.getpid()))
    time.sleep(120)
child_main(work)
"""


def test_a_job_does_not_outlive_who_started_it(tmp_path):
    (tmp_path / "a_child.py").write_text(CHILD)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment)
    pid = tmp_path / "pid"
    _until(lambda: pid.exists() and pid.read_text())
    child = int(pid.read_text())
    parent.kill()
    parent.wait()
    _until(lambda: not _runs(child))


def _until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

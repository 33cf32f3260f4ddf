"""Both ends of a job that runs in a fresh process: `python -m MODULE --spec JSON --out FILE`.

A job that fails, or dies, is an outcome with a status and a reason, never the end of the run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from mmpeft_fast.atomic import write_text

POLL_SECONDS = 0.5


def child_main(work: Callable[[dict], dict]) -> int:
    """The job's end: runs `work` on --spec and writes its outcome to --out.

    Args:
        work: takes the job's JSON object, returns the fields of its outcome.

    Returns:
        exit code 0; the outcome says `{"status": "ok", ...}` or `{"status": "failed", "reason": ...}`.
    """
    parser = argparse.ArgumentParser(description="one job of the small study")
    parser.add_argument("--spec", required=True, type=json.loads, help="the job as a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="file for the outcome, a JSON object")
    args = parser.parse_args()
    write_text(args.out, json.dumps(outcome_of(lambda: work(args.spec))))
    return 0


def outcome_of(work: Callable[[], dict]) -> dict:
    """What `work` returns with a status, or the reason why it did not."""
    try:
        return {"status": "ok", **work()}
    except Exception as error:
        # The process boundary: whatever went wrong becomes a row's reason, and the log has the traceback.
        traceback.print_exc()
        return {"status": "failed", "reason": _reason(error)}


def run_job(module: str, job: dict, *, log_path: Path, threads: int, offline: bool, tick: Callable[[], None]) -> dict:
    """The parent's end: runs a job to its end and returns its outcome.

    Args:
        module: name of the module to run.
        job: its JSON object.
        log_path: file for everything the job prints.
        threads: CPU threads the job may use.
        offline: whether to forbid the hub's client to look for anything outside.
        tick: called about twice a second while the job runs.

    Returns:
        `{"status": "ok", ...}` or `{"status": "failed", "reason": one sentence}`.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder, log_path.open("w") as log:
        out = Path(folder) / "outcome.json"
        command = [sys.executable, "-m", module, "--spec", json.dumps(job), "--out", str(out)]
        # Detached from the terminal: Ctrl-C reaches the parent alone, which then ends the job without a traceback.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _wait(process, tick)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if out.exists():
            return json.loads(out.read_text())
        return {"status": "failed", "reason": f"{_death(process.returncode)}; see {log_path}"}


def _wait(process: subprocess.Popen, tick: Callable[[], None]) -> None:
    while True:
        try:
            process.wait(timeout=POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            tick()


def _death(returncode: int) -> str:
    """How a process ended that left no outcome."""
    if returncode >= 0:
        return f"the process ended early with exit code {returncode}"
    hint = ", perhaps for lack of memory" if -returncode == signal.SIGKILL else ""
    return f"the process was ended by {signal.Signals(-returncode).name}{hint}"


def _reason(error: Exception) -> str:
    """An exception as one sentence: its type and the first sentence of its message's first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].split('. ')[0]}" if lines else type(error).__name__

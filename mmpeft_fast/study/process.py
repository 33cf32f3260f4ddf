"""Both ends of a job that runs in fresh processes: `python -m MODULE --spec JSON --out FILE`.

A job that fails, or dies, is an outcome with a status and a reason, never the end of the run. A job does not outlive
who started it: the next run would find it at work in its own folder.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmpeft_fast.atomic import write_text
from mmpeft_fast.memory_errors import is_out_of_memory
from mmpeft_fast.study.rows import FAILED, OOM, SUCCESS

POLL_SECONDS = 0.5
_STARTED_BY = "MMPEFT_FAST_STARTED_BY"  # the process that waits for a job's outcome


@dataclass(frozen=True, kw_only=True)
class Job:
    """A piece of work for fresh processes.

    Attributes:
        module: name of the module to run.
        spec: what it gets, a JSON object.
        log: file for everything it prints.
        threads: CPU threads of all its processes together.
        offline: whether to forbid the hub's client to look for anything outside.
        processes: more than one are started by torchrun.
        micro_batch: samples a forward pass, which the module finds in its spec; halved while memory runs out.
    """

    module: str
    spec: dict[str, Any]
    log: Path
    threads: int
    offline: bool = True
    processes: int = 1
    micro_batch: int | None = None


def child_main(work: Callable[[dict], dict]) -> int:
    """The job's end: runs `work` on --spec and writes its outcome to --out.

    Args:
        work: takes the job's JSON object, returns the fields of its outcome.

    Returns:
        exit code 0; the outcome says `{"status": "success", ...}`, or "failed" or "oom" with a "reason". Of several
        processes the first one's success counts, and any one's failure, which ends them all (exit code 1).
    """
    parser = argparse.ArgumentParser(description="one job of the small study")
    parser.add_argument("--spec", required=True, type=json.loads, help="the job as a JSON object")
    parser.add_argument("--out", required=True, type=Path, help="file for the outcome, a JSON object")
    args = parser.parse_args()
    _end_with_who_started_it()
    outcome = outcome_of(lambda: work(args.spec))
    is_failed, is_alone = outcome["status"] != SUCCESS, int(os.environ.get("WORLD_SIZE", 1)) == 1
    if is_failed or int(os.environ.get("RANK", 0)) == 0:
        write_text(args.out, json.dumps(outcome))
    if is_failed and not is_alone:
        os._exit(1)  # no farewell to the other processes, who may wait for this one
    return 0


def _end_with_who_started_it() -> None:
    """Ends this process when its parent, or who waits for its outcome, has ended."""
    parent, waiting = os.getppid(), os.environ.get(_STARTED_BY)

    def watch() -> None:
        while os.getppid() == parent and (waiting is None or _is_alive(int(waiting))):
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def outcome_of(work: Callable[[], dict]) -> dict:
    """What `work` returns with a status, or the reason why it did not."""
    try:
        return {"status": SUCCESS, **work()}
    except Exception as error:
        # The process boundary: whatever went wrong becomes a row's reason, and the log has the traceback.
        traceback.print_exc()
        return {"status": OOM if is_out_of_memory(error) else FAILED, "reason": _reason(error)}


def run_job(job: Job, tick: Callable[[], None] = lambda: None) -> dict:
    """The parent's end: runs a job to its end and returns its outcome.

    Args:
        job: what to run.
        tick: called about twice a second while the job runs.

    Returns:
        `{"status": "success", ...}`, or "failed" or "oom" with one sentence as "reason".
    """
    threads = max(1, job.threads // job.processes)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        _STARTED_BY: str(os.getpid()),
    }
    if job.offline:
        environment["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder, job.log.open("w") as log:
        out = Path(folder) / "outcome.json"
        command = [sys.executable, "-m"]
        if job.processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes), "-m"]
        spec = job.spec if job.micro_batch is None else {**job.spec, "micro_batch": job.micro_batch}
        command += [job.module, "--spec", json.dumps(spec), "--out", str(out)]
        # Detached from the terminal: Ctrl-C reaches the parent alone, which then ends the job without a traceback.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            _wait(process, tick)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if out.exists():
            return json.loads(out.read_text())
        return {"status": FAILED, "reason": f"{_death(process.returncode)}; see {job.log}"}


def run_fitting(job: Job, tick: Callable[[], None] = lambda: None) -> dict:
    """As `run_job`, with half of the micro-batch again and again where memory runs out, down to one sample."""
    outcome = run_job(job, tick)
    while outcome["status"] == OOM and job.micro_batch is not None and job.micro_batch > 1:
        job = replace(job, micro_batch=job.micro_batch // 2)
        outcome = run_job(job, tick)
    return outcome


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

"""Runs items of work in worker processes under a deadline: a crash, a hang or a lost GPU ends one item, not the run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.gpu.repository import ROOT

_POLL_SECONDS = 0.1


class _Worker:
    """One process at a time and the thread that feeds it; a process that died is replaced while items remain."""

    def __init__(self, run: "_Run"):
        self.run = run
        self.process: subprocess.Popen | None = None
        self.item: dict | None = None
        self.since = 0.0
        self.killed_for: str | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def kill(self, reason: str) -> None:
        """Ends the process and what it started."""
        process = self.process
        if process is not None and process.poll() is None:
            self.killed_for = reason
            with contextlib.suppress(ProcessLookupError):  # it may end by itself just now
                os.killpg(process.pid, signal.SIGKILL)

    def _work(self) -> None:
        while (item := self.run.next_item()) is not None:
            if self.process is None or self.process.poll() is not None:
                self.process = self.run.start_process()
            self.item, self.since = item, time.monotonic()
            finished = self._one(item)
            self.item = None
            if not finished:
                code = self.process.wait()
                if self.run.stopped:
                    self.run.unfinished.append(item)
                else:
                    self.run.on_row(item, {"error": self.killed_for or f"the process died with status {code}"})
                self.killed_for = None
        if self.process is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()

    def _one(self, item: dict) -> bool:
        """Whether the process got through the item."""
        try:
            self.process.stdin.write(json.dumps(item) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        for line in self.process.stdout:
            if not line.endswith("\n"):  # killed while it wrote
                return False
            message = json.loads(line)
            if "done" in message:
                if message["is_last"]:
                    self.process.wait()
                return True
            self.run.on_row(item, message["row"])
        return False


class _Run:
    def __init__(self, work: str, items: Sequence[dict], on_row, environment: Mapping[str, str], log: Path):
        self.work, self.environment, self.log = work, environment, log
        self._items, self._lock = deque(items), threading.Lock()
        self._on_row = on_row
        self.stopped = False
        self.unfinished: list[dict] = []  # cut off by the deadline; nobody's fault, so no row

    def next_item(self) -> dict | None:
        with self._lock:
            return self._items.popleft() if self._items and not self.stopped else None

    def stop(self) -> None:
        """No further item is started."""
        with self._lock:
            self.stopped = True

    def left(self) -> list[dict]:
        """The items that were not finished, once everything has ended."""
        return self.unfinished + list(self._items)

    def on_row(self, item: dict, row: dict) -> None:
        with self._lock:
            self._on_row(item, row)

    def start_process(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "bench.gpu.worker", self.work]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **self.environment}, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip


def run_items(
    work: str,
    items: Sequence[dict],
    on_row: Callable[[dict, dict], None],
    *,
    seconds: float,
    log: Path,
    num_processes: int = 1,
    item_seconds: float = float("inf"),
    environment: Mapping[str, str] | None = None,
) -> list[dict]:
    """Runs `work` ("module:function") on every item, in order, in worker processes.

    Args:
        items: keyword arguments of the function, JSON-able.
        on_row: called with (item, row) for every row, by one thread at a time. An item that fails gives a row with
            "error".
        seconds: after these everything still running is ended.
        log: file that the processes' stderr is appended to.
        item_seconds: the most that one item may take.
        environment: variables to add for the processes.

    Returns:
        The items that were not done in time; one that was cut off may have given some of its rows.
    """
    deadline = time.monotonic() + seconds
    run = _Run(work, items, on_row, environment or {}, log)
    if seconds <= 0:
        return run.left()
    workers = [_Worker(run) for _ in range(max(1, min(num_processes, len(items))))]
    try:
        while any(worker.thread.is_alive() for worker in workers):
            now = time.monotonic()
            if now > deadline:
                break
            for worker in workers:
                if worker.item is not None and now - worker.since > item_seconds:
                    worker.kill(f"ran longer than {item_seconds:g} s")
            time.sleep(_POLL_SECONDS)
    finally:
        run.stop()
        # A worker may be just starting its process: kill until every thread has seen the end.
        while any(worker.thread.is_alive() for worker in workers):
            for worker in workers:
                worker.kill("cut off")
            time.sleep(_POLL_SECONDS)
    return run.left()

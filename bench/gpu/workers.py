"""Runs items of work in worker processes under a deadline: a crash, a hang or a lost GPU ends one item, not the run.

An item is {"work": "module:function", "args": {...}} and, if it is so, "fresh": True for a process of its own and
"seconds", the most that it may take.
"""

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

_POLL_SECONDS = 0.05


class _Worker:
    """One process at a time and the thread that feeds it. While an item has a process to itself, the next one's
    process is started and imports what it needs."""

    def __init__(self, run: "_Run"):
        self.run = run
        self.process: subprocess.Popen | None = None
        self.spare: subprocess.Popen | None = None
        self.item: dict | None = None
        self.since = 0.0
        self.killed_for: str | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def kill(self, reason: str, *, everything: bool = False) -> None:
        """Ends the process and what it started; with `everything` the one that waits, too."""
        for process in (self.process, self.spare if everything else None):
            if process is not None and process.poll() is None:
                self.killed_for = reason
                with contextlib.suppress(ProcessLookupError):  # it may end by itself just now
                    os.killpg(process.pid, signal.SIGKILL)

    def _work(self) -> None:
        while (item := self.run.next_item()) is not None:
            if self.process is None or self.process.poll() is not None:
                self.process, self.spare = self.spare or self.run.start_process(item), None
            if item.get("fresh") and self.run.has_more():
                self.spare = self.run.start_process(item)
            self.killed_for = None
            self.item, self.since = item, time.monotonic()
            finished = self._one(item)
            self.item = None
            if not finished:
                code = self.process.wait()
                if self.run.stopped:
                    self.run.unfinished.append(item)
                elif self.killed_for:
                    self.run.on_row(item, {"error": self.killed_for, "unfinished": True})
                else:
                    self.run.on_row(item, {"error": f"the process died with status {code}"})
        for process in filter(None, (self.process, self.spare)):
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()

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
                if message["last"]:
                    self.process.wait()
                return True
            self.run.on_row(item, message["row"])
        return False


class _Run:
    def __init__(self, items: Sequence[dict], on_row, environment: Mapping[str, str], log: Path):
        self.environment, self.log = environment, log
        self._items, self._lock = deque(items), threading.Lock()
        self._on_row = on_row
        self.stopped = False
        self.unfinished: list[dict] = []  # cut off by the deadline; nobody's fault, so no row

    def next_item(self) -> dict | None:
        with self._lock:
            return self._items.popleft() if self._items and not self.stopped else None

    def has_more(self) -> bool:
        with self._lock:
            return bool(self._items) and not self.stopped

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

    def start_process(self, item: dict) -> subprocess.Popen:
        command = [sys.executable, "-m", "bench.gpu.worker", item["work"].split(":")[0]]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **self.environment}, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip


def run_items(
    items: Sequence[dict],
    on_row: Callable[[dict, dict], None],
    *,
    seconds: float,
    log: Path,
    processes: int = 1,
    environment: Mapping[str, str] | None = None,
) -> list[dict]:
    """Runs items in order.

    Args:
        on_row: called with (item, row) for every row, by one thread at a time. An item that fails gives a row with
            "error", and with "unfinished" where it was only too slow.
        seconds: after these everything still running is ended.
        log: file that the processes' stderr is appended to.
        environment: variables to add for the processes.

    Returns:
        The items that were not done in time; one that was cut off may have given some of its rows.
    """
    deadline = time.monotonic() + seconds
    run = _Run(items, on_row, environment or {}, log)
    if seconds <= 0 or not items:
        return run.left()
    workers = [_Worker(run) for _ in range(max(1, min(processes, len(items))))]
    try:
        while any(worker.thread.is_alive() for worker in workers):
            now = time.monotonic()
            if now > deadline:
                break
            for worker in workers:
                item = worker.item
                if item is not None and now - worker.since > item.get("seconds", float("inf")):
                    worker.kill(f"ran longer than {item['seconds']:g} s")
            time.sleep(_POLL_SECONDS)
    finally:
        run.stop()
        # A worker may be just starting its process: kill until every thread has seen the end.
        while any(worker.thread.is_alive() for worker in workers):
            for worker in workers:
                worker.kill("cut off", everything=True)
            time.sleep(_POLL_SECONDS)
    return run.left()

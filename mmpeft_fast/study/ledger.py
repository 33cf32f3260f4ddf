"""The cells that a run still has to do, and the row of each as it ends."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mmpeft_fast.study.in_turn import Runner
from mmpeft_fast.study.process import Job
from mmpeft_fast.study.progress import Progress
from mmpeft_fast.study.rows import CANCELLED, FAILED, OOM, SUCCESS, read_rows, store_row


class Ledger:
    """Keeps rows in a run's folder.

    pending: the cells to do (each with a `name` and a `key`), in order; `left` has by key those that have not ended.
    row_of: a cell, its outcome and its seconds -> its row. succeeded: told of a cell once its row is kept.
    """

    def __init__(
        self,
        folder: Path,
        pending: Sequence[Any],
        progress: Progress,
        row_of: Callable[[Any, dict, float], dict],
        succeeded: Callable[[Any], None] = lambda cell: None,
    ) -> None:
        self.left = {cell.key: cell for cell in pending}
        self._folder, self._progress, self._row_of, self._succeeded = folder, progress, row_of, succeeded
        self._number, self._is_running = len(pending), False

    def keep(self, cell: Any, outcome: dict, elapsed_s: float = 0.0) -> None:
        """A cell has ended."""
        row = self._row_of(cell, outcome, elapsed_s)
        if row["status"] in (FAILED, OOM):
            self._progress.say(f"{row['status']}: {cell.name}: {row['reason']}")
        store_row(self._folder, row)
        if row["status"] == SUCCESS:
            self._succeeded(cell)
        self.left.pop(cell.key)

    def fail(self, cell: Any, reason: str) -> None:
        """A cell cannot run."""
        self._progress.start(cell.name)
        self._progress.finish()
        self.keep(cell, {"status": FAILED, "reason": reason})

    def run(self, runner: Runner, jobs: Sequence[tuple[Any, Job]]) -> None:
        """Works off cells, each with its job, and keeps them."""
        self._is_running = True
        with closing(runner.run([(cell.name, job) for cell, job in jobs], self._progress)) as all_ended:
            for ended in all_ended:
                self.keep(jobs[ended.index][0], ended.outcome, ended.elapsed_s)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Ctrl-C inside leaves the running cell a row that says so, where it has none, and says how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            cell = next(iter(self.left.values()), None)
            known = {row["spec_key"] for row in read_rows(self._folder)}
            if self._is_running and cell is not None and cell.key not in known:
                store_row(self._folder, self._row_of(cell, {"status": CANCELLED, "reason": "interrupted"}, 0.0))
            done = f"{self._number - len(self.left)} of {self._number} cells are done"
            raise KeyboardInterrupt(f"{done}; the same command goes on from here") from None
        finally:
            self._progress.clear()

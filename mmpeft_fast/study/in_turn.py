"""How the cells of a run are worked off: one after another here, or many at once on a Ray cluster (`on_ray`)."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from mmpeft_fast.study.process import Job, run_fitting
from mmpeft_fast.study.progress import Progress


class Ended(NamedTuple):
    """index: of the job among those given. elapsed_s: from its start."""

    index: int
    outcome: dict
    elapsed_s: float


class Runner(Protocol):
    """shares_processes: whether cells that are not timed may share a process, in which they come one after another."""

    shares_processes: bool

    def run(self, jobs: Sequence[tuple[str, Job]], progress: Progress) -> Iterator[Ended]:
        """Runs jobs, each with its name, to their ends; each is told when it has ended. To stop early ends them all."""
        ...


class InTurn:
    """Every job alone on this machine, so that its times are its own."""

    shares_processes = True

    def run(self, jobs: Sequence[tuple[str, Job]], progress: Progress) -> Iterator[Ended]:
        for index, (name, job) in enumerate(jobs):
            started = time.monotonic()
            progress.start(name)
            outcome = run_fitting(job, progress.tick)
            progress.finish()
            yield Ended(index, outcome, time.monotonic() - started)

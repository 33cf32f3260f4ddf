"""Cells on a Ray cluster (`study --ray`, optional extra `ray`): as many at once as its processors and GPUs take.

Each is a task whose worker starts the job's fresh processes, as `in_turn` does here. The package is installed on every
node, and the output folder is on a disk that all of them see: rows, logs and checkpoints are the same files. When a
worker is lost Ray starts its cell again elsewhere, which goes on from its last checkpoint.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from mmpeft_fast.study.in_turn import Ended
from mmpeft_fast.study.process import POLL_SECONDS, Job, run_fitting
from mmpeft_fast.study.progress import Progress
from mmpeft_fast.study.rows import FAILED

_TRIES = 4


class OnRay:
    """gpus: of a cell, for each of its processes; a share below 1 puts several cells on one GPU."""

    shares_processes = False

    def __init__(self, address: str | None, *, gpus: float) -> None:
        """Joins the cluster at `address`; None: that of RAY_ADDRESS, or one of this machine's own.

        Raises:
            ValueError: Ray is missing, or there is no cluster at the address.
        """
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "--ray: expected the package ray, which is missing; pip install 'mmpeft-fast[ray]'"
            ) from error
        self._ray, self._gpus = ray, gpus
        if not ray.is_initialized():
            try:
                ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"--ray: expected a Ray cluster at {address!r}, found none: {reason}") from error

    def run(self, jobs: Sequence[tuple[str, Job]], progress: Progress) -> Iterator[Ended]:
        started = time.monotonic()
        waiting = {self._submit(job): index for index, (_, job) in enumerate(jobs)}
        try:
            while waiting:
                progress.start(f"{len(waiting)} cells on Ray, {jobs[min(waiting.values())][0]} among them")
                done: list[Any] = []
                while not done:
                    done, _ = self._ray.wait(list(waiting), timeout=POLL_SECONDS)
                    progress.tick()
                progress.finish()
                index, outcome = waiting.pop(done[0]), self._outcome(done[0])
                yield Ended(index, outcome, outcome.pop("elapsed_s", time.monotonic() - started))
        finally:
            for task in waiting:
                self._ray.cancel(task, force=True)

    def _submit(self, job: Job) -> Any:
        options = {"num_cpus": job.threads, "num_gpus": self._gpus * job.processes, "max_retries": _TRIES - 1}
        return self._ray.remote(**options)(_timed).remote(job)

    def _outcome(self, task: Any) -> dict:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
            return {"status": FAILED, "reason": f"lost by Ray in {_TRIES} tries: {reason}"}


def _timed(job: Job) -> dict:
    """On a worker: the outcome, and how long it took there."""
    started = time.monotonic()
    return run_fitting(job) | {"elapsed_s": time.monotonic() - started}

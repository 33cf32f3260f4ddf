"""The collated micro-batches of each optimizer step, loaded in this process or by workers."""

import signal
import traceback
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader

from mmpeft_fast.data import Collator, Sample
from mmpeft_fast.train.order import SampleOrder

# Ctrl-C, what a scheduler or `kill` sends, and a closed terminal.
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def batches_by_step(
    order: SampleOrder,
    start: int,
    stop: int,
    dataset: Sequence[Sample],
    collator: Collator,
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[dict]]:
    """Yield, for steps start to stop, the list of the step's collated micro-batches on this process.

    Raises ValueError for a sample the collator refuses, in its own words even from a worker.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_MicroBatches(order, start, stop),
        collate_fn=collator,
        num_workers=num_workers,
        worker_init_fn=_ignore_interrupt,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from torch's global one, and resuming would not be exact
    )
    batches = iter(loader)
    try:
        for step in range(start, stop):
            yield [next(batches) for _ in order.micro_batches(step)]
    except Exception as error:
        if num_workers == 0:
            raise
        # Frames of a traceback that somebody keeps would hold the iterator, and with it its workers, for which the
        # process waits as it ends.
        traceback.clear_frames(error.__traceback__)
        if not isinstance(error, ValueError):
            raise
        # A worker's error arrives with its whole traceback as the message; the last line is what it said.
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
    finally:
        del batches


class _MicroBatches:
    """A DataLoader's batch sampler over the micro-batches of steps start to stop."""

    def __init__(self, order: SampleOrder, start: int, stop: int) -> None:
        self._order, self._steps = order, range(start, stop)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            yield from self._order.micro_batches(step)


def _ignore_interrupt(worker: int) -> None:
    """Leave what asks a run to end to the main process, which finishes its step and needs the loader until then; the
    workers end with their loader, or when they find their parent gone."""
    for name in INTERRUPTS:
        signal.signal(name, signal.SIG_IGN)

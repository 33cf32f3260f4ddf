"""Which samples each optimizer step sees: a pure function of the step, so resuming needs no more than its number."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from mmpeft_fast.data import Packing


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """A fresh random order every epoch, cut into global batches, shared out over processes, cut into micro-batches.

    An epoch's last global batch may be smaller. Where it does not divide by the number of processes, the samples left
    over are skipped, so that all processes do the same number of passes.

    groups: a number for each sample; samples of one number stay together, in a random order among themselves, and so do
    they on a process. None: every sample for itself.
    packing: cuts a global batch into micro-batches by their tokens instead of batch_size, as many on every process.
    """

    num_samples: int
    global_batch_size: int
    batch_size: int
    seed: int
    process_index: int = 0
    num_processes: int = 1
    groups: tuple[int, ...] | None = None
    packing: Packing | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and len(self.groups) != self.num_samples:
            raise ValueError(f"groups: expected one of each of {self.num_samples} samples, got {len(self.groups)}")
        if self.num_samples < self.num_processes:
            raise ValueError(f"data: expected at least {self.num_processes} samples, got {self.num_samples}")
        share = self.batch_size * self.num_processes
        if self.packing is None and self.global_batch_size % share:
            raise ValueError(
                f"global_batch_size: expected a multiple of {share} (batch_size {self.batch_size} "
                f"on {self.num_processes} processes), got {self.global_batch_size}"
            )

    @property
    def steps_per_epoch(self) -> int:
        usable = self.num_samples
        last = usable % self.global_batch_size
        return usable // self.global_batch_size + (last >= self.num_processes)

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps in so many epochs, rounded up."""
        return math.ceil(epochs * self.steps_per_epoch)

    def micro_batches(self, step: int) -> list[list[int]]:
        """This process's sample indices for a step (counted from 0), one list per forward."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.global_batch_size
        order = _permutation(self.num_samples, self.seed + epoch, self.groups)
        chosen = order[start : start + self.global_batch_size]
        even = len(chosen) - len(chosen) % self.num_processes
        if self.packing is not None:
            return self.packing.batches(chosen[:even], self.num_processes)[self.process_index :: self.num_processes]
        if self.groups is None:
            mine = chosen[self.process_index : even : self.num_processes]
        else:
            share = even // self.num_processes
            mine = chosen[self.process_index * share : (self.process_index + 1) * share]
        return [mine[first : first + self.batch_size] for first in range(0, len(mine), self.batch_size)]


@lru_cache(maxsize=1)
def _permutation(num_samples: int, seed: int, groups: tuple[int, ...] | None) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_samples, generator=generator).tolist()
    if groups is None:
        return order
    members: dict[int, list[int]] = {}  # by the first of a group in the random order, which is one of groups as well
    for index in order:
        members.setdefault(groups[index], []).append(index)
    return [index for group in members.values() for index in group]

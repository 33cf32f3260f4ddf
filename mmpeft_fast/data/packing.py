"""Which samples share a batch so that none has more tokens than a budget: first-fit-decreasing bin packing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Size(NamedTuple):
    """Tokens of a sample; of these, how many it shares with samples of the same group in its batch, at least."""

    length: int
    context: int = 0
    group: int = 0


@dataclass(frozen=True, kw_only=True)
class Packing:
    """A token budget, and what samples need of it.

    sizes: of each sample. budget: tokens a batch, padding included. is_padded: whether samples lie in rows of their
    own, as long as the longest, or behind one another in one row. multiple_of: rows' lengths are multiples of it.
    """

    sizes: tuple[Size, ...]
    budget: int
    is_padded: bool = False
    multiple_of: int = 1

    def tokens(self, members: Iterable[int]) -> int:
        """Of a batch of these samples, at most."""
        sizes = [self.sizes[index] for index in members]
        if self.is_padded:
            return len(sizes) * self._round(max(size.length for size in sizes))
        contexts = {size.group: size.context for size in sizes if size.context}
        return self._round(sum(contexts.values()) + sum(size.length - size.context for size in sizes))

    def batches(self, members: Sequence[int], num_processes: int = 1) -> list[list[int]]:
        """The samples in batches within the budget, as many for each process: so many that num_processes divides them.

        First-fit-decreasing: samples that share a context stay together and go, the largest first, into the first
        batch with room for them. members: a multiple of num_processes, each alone within the budget.
        """
        together: dict[tuple[int, ...], list[int]] = {}
        for index in members:
            size = self.sizes[index]
            together.setdefault((size.group,) if size.context and not self.is_padded else (-1, index), []).append(index)
        items = [part for group in together.values() for part in self._first_fit([[index] for index in group])]
        batches = self._first_fit(items)
        while len(batches) % num_processes:  # half of a batch needs no more than all of it
            largest = max(range(len(batches)), key=lambda index: (len(batches[index]), -index))
            half = len(batches[largest]) // 2
            batches[largest : largest + 1] = [batches[largest][:half], batches[largest][half:]]
        return batches

    def _first_fit(self, items: list[list[int]]) -> list[list[int]]:
        bins: list[list[int]] = []
        for item in sorted(items, key=self.tokens, reverse=True):
            found = next((bin_ for bin_ in bins if self.tokens(bin_ + item) <= self.budget), None)
            if found is None:
                bins.append(list(item))
            else:
                found += item
        return bins

    def _round(self, length: int) -> int:
        return -(-length // self.multiple_of) * self.multiple_of

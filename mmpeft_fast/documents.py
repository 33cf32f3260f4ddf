"""Which tokens of a row see which: documents that lie behind one another, and contexts that several of them share.

A row holds documents in order, each a run of tokens. A document's tokens see its own tokens before them and all tokens
of the documents above it: its parent, the parent's parent, .. . What lies behind the last document is padding. With one
document a row this is causal attention; without parents it is packing; with them, a context that many answers follow is
computed once, which is exact because attention is causal: nothing in the context sees an answer.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.labels import IGNORE_INDEX


class Span(NamedTuple):
    """Queries [start, stop) of a row that attend to its keys [first, last): causally where these are the same tokens,
    densely elsewhere."""

    row: int
    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class Documents:
    """The documents of every row of a batch.

    rows: for each row a tuple of (length, parent) in order; parent is the index in the row of a document before it, -1
    where it has none. The documents below one follow it directly, before any other.

    Raises:
        ValueError: a length is below 0, a parent comes later or is not above the document before; what is expected and
            what came.
    """

    rows: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self):
        for row in self.rows:
            for index, (length, parent) in enumerate(row):
                if length < 0:
                    raise ValueError(f"documents: expected lengths of at least 0, got {length}")
                if not -1 <= parent < index:
                    raise ValueError(
                        f"documents: expected document {index}'s parent to be one before it or -1, got {parent}"
                    )
                if parent >= 0 and parent not in (index - 1, *_above(row, index - 1)):
                    raise ValueError(
                        f"documents: expected document {index} to follow what is below its parent {parent} directly, "
                        f"document {index - 1} in front of it is not"
                    )
        object.__setattr__(self, "_hash", hash(self.rows))

    def __hash__(self) -> int:  # once, not at every call
        return self._hash

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row, padding aside."""
        return [sum(length for length, _ in row) for row in self.rows]

    @functools.cached_property
    def bounds(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Of each row, where its documents begin and end."""
        ends = [[0, *itertools.accumulate(length for length, _ in row)] for row in self.rows]
        return tuple(tuple(itertools.pairwise(of_row)) for of_row in ends)

    @functools.cached_property
    def levels(self) -> tuple[tuple[Span, ...], ...]:
        """Attention in parts, each of whose spans have queries of their own: every document on itself, then what is
        below the documents of depth 0, 1, .. on these."""
        own: list[Span] = []
        below: dict[int, list[Span]] = {}
        for row_idx, (row, bounds) in enumerate(zip(self.rows, self.bounds, strict=True)):
            ends = [stop for _, stop in bounds]  # of a document with all that is below it
            for index in reversed(range(len(row))):
                parent = row[index][1]
                if parent >= 0:
                    ends[parent] = max(ends[parent], ends[index])
            for index, (start, stop) in enumerate(bounds):
                if stop > start:
                    own.append(Span(row_idx, start, stop, start, stop))
                    if ends[index] > stop:
                        depth = len(_above(row, index))
                        below.setdefault(depth, []).append(Span(row_idx, stop, ends[index], start, stop))
        return (tuple(own), *(tuple(below[depth]) for depth in sorted(below)))

    def position_ids(self, length: int | None = None, device: torch.device | str = "cpu") -> Tensor:
        """[B, length] int64: a document goes on where its parent ends; 0 for padding. length: of the longest row where
        None."""
        length = max(self.lengths, default=0) if length is None else length
        positions = torch.zeros(len(self.rows), length, dtype=torch.long)
        for row_idx, (row, bounds) in enumerate(zip(self.rows, self.bounds, strict=True)):
            ends: list[int] = []  # positions at which documents end
            for (size, parent), (start, stop) in zip(row, bounds, strict=True):
                first = 0 if parent < 0 else ends[parent]
                positions[row_idx, start:stop] = torch.arange(first, first + size)
                ends.append(first + size)
        return positions.to(device)

    def mask(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """[B, 1, length, length] bool: True where a query (third dimension) attends to a key. Padding attends to
        itself, so that no row of scores is empty."""
        return self.mask_of(torch.arange(length, device=device).expand(len(self.rows), length), length)

    def mask_of(self, positions: Tensor, length: int) -> Tensor:
        """The rows of `mask` at positions [B, C]: [B, 1, C, length]."""
        sees, document = _tables(self, length, positions.device)
        mine = document.gather(1, positions)  # [B, C]
        related = sees.gather(1, mine[..., None].expand(-1, -1, sees.shape[2]))  # [B, C, documents]
        keys = related.gather(2, document[:, None].expand(-1, positions.shape[1], -1))  # [B, C, length]
        order = torch.arange(length, device=positions.device)
        is_own = mine[..., None] == document[:, None]
        allowed = torch.where(is_own, order <= positions[..., None], keys)
        is_padding = mine[..., None] == sees.shape[2] - 1
        return torch.where(is_padding, order == positions[..., None], allowed)[:, None]


def _above(row: Sequence[tuple[int, int]], index: int) -> list[int]:
    """The documents above one, the nearest first."""
    found = []
    while index >= 0 and row[index][1] >= 0:
        index = row[index][1]
        found.append(index)
    return found


@functools.lru_cache(maxsize=64)
def _tables(documents: Documents, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """sees [B, N, N] bool: whether a document sees all of another; document [B, length]: that of each token, the last
    number N - 1 for padding."""
    most = 1 + max([0, *map(len, documents.rows)])
    sees = torch.zeros(len(documents.rows), most, most, dtype=torch.bool)
    document = torch.full((len(documents.rows), length), most - 1)
    for row_idx, (row, used) in enumerate(zip(documents.rows, documents.lengths, strict=True)):
        if used > length:
            raise ValueError(f"documents: expected at most {length} tokens in row {row_idx}, got {used}")
        for index, (start, stop) in enumerate(documents.bounds[row_idx]):
            document[row_idx, start:stop] = index
            sees[row_idx, index, _above(row, index)] = True
    return sees.to(device), document.to(device)


@functools.lru_cache(maxsize=64)
def not_targets(documents: Documents, length: int, device: torch.device) -> Tensor:
    """[B, length] bool: tokens that nothing in their row predicts once: the first of each document, whose predecessor
    is not beside it, and those that documents below share, whose loss would count once instead of for each of these."""
    found = torch.zeros(len(documents.rows), length, dtype=torch.bool)
    for row_idx, row in enumerate(documents.rows):
        parents = {parent for _, parent in row}
        for index, (start, stop) in enumerate(documents.bounds[row_idx]):
            found[row_idx, start : stop if index in parents else min(start + 1, stop)] = True
    return found.to(device)


def misplaced(documents: Documents, labels: Tensor) -> Tensor:
    """[B, T] bool: labels [B, T] that stand on `not_targets`."""
    return (labels != IGNORE_INDEX) & not_targets(documents, labels.shape[1], labels.device)


def with_dense_mask(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch for a model that knows no documents: a dense attention mask in their place."""
    plain = dict(batch)
    documents = plain.pop("documents", None)
    if documents is not None:
        labels = plain["labels"]
        plain["attention_mask"] = documents.mask(labels.shape[1], labels.device)
    return plain


def check_documents(documents: object, batch: int, length: int) -> None:
    """Raises ValueError unless they are documents of so many rows of at most so many tokens."""
    if not isinstance(documents, Documents):
        raise ValueError(f"documents: expected mmpeft_fast.Documents, got {type(documents).__name__}")
    if len(documents.rows) != batch or max(documents.lengths, default=0) > length:
        raise ValueError(
            f"documents: expected {batch} rows of at most {length} tokens, got {len(documents.rows)} rows of "
            f"{documents.lengths}"
        )

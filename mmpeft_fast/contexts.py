"""Rows of a batch that begin alike, as one row of documents, and the way back.

A preference pair has two answers to one prompt, a group of completions eight. As rows [B, T] the prompt's activations
are computed once for each; as a tree of documents (`documents.py`) once. `shared_rows` builds the tree from nothing but
the rows, and `SharedRows.spread` gives every row its hidden states, so that whatever reads them stays as it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.documents import Documents

# A shorter beginning costs more as a part of its own than it saves.
LEAST_SHARED = 32


@dataclass(frozen=True)
class SharedRows:
    """B rows as one row of L tokens.

    Attributes:
        input_ids: [1, L] int64.
        position_ids: [1, L] int64.
        documents: which of the L tokens see which.
        places: [B, T] int64, where each token of the rows lies among the L; -1 for padding.
        images: numbers of the images that the L tokens show, in their order.
        is_padded: whether any of the rows has padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    documents: Documents
    places: Tensor
    images: tuple[int, ...] = ()
    is_padded: bool = True

    @property
    def batch(self) -> dict[str, Any]:
        """What a fused model is called with in place of the rows' own ids, mask and positions."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "documents": self.documents}

    def gathered(self, values: Tensor) -> Tensor:
        """Values [.., B, T] of the rows' tokens, the same for a token that rows share, as [.., 1, L]."""
        is_token = (self.places >= 0).flatten()
        found = values.new_zeros((*values.shape[:-2], 1, self.input_ids.shape[1]))
        found[..., 0, self.places.flatten()[is_token]] = values.flatten(-2)[..., is_token]
        return found

    def spread(self, hidden: Tensor) -> Tensor:
        """[1, L, H], or logits [1, L, V], as rows [B, T, ..]; zeros for padding. Gradients of a shared token are
        sums."""
        rows = hidden[0][self.places.clamp(min=0)]
        return rows.masked_fill((self.places < 0)[..., None], 0.0) if self.is_padded else rows


def shared_rows(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    image_token: int | None = None,
    images: Sequence[int] = (),
    least: int | None = None,
) -> SharedRows | None:
    """The rows' tree: what at least two of them begin with alike lies there once, at any depth.

    Nothing but a host copy of the ids and the mask is needed; on an accelerator that waits for it.

    Args:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 for tokens and 0 for padding, which lies on one side of a row; None: no padding.
        image_token: the id that stands for image features; rows with it are alike only where their images are.
        images: for each row with image tokens, in order, a number that is the same for equal images.
        least: fewer equal tokens are not shared; LEAST_SHARED where None.

    Returns:
        None where nothing is shared, or only part of an image would be.

    Raises:
        ValueError: shapes that are none of these, padding between tokens, or not one image for each row with image
            tokens; what was expected and what came.
    """
    if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        got = [list(each.shape) for each in (input_ids, attention_mask) if each is not None]
        raise ValueError(f"shared_rows: expected input_ids [B, T], and a mask of that shape or none, got {got}")
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    ids, real = input_ids.tolist(), real.tolist()
    rows, starts = [], []
    for row, is_real in zip(ids, real, strict=True):
        start = is_real.index(True) if any(is_real) else 0
        length = sum(is_real)
        if not all(is_real[start : start + length]):
            raise ValueError("shared_rows: expected padding on one side of a row, got some between tokens")
        rows.append(row[start : start + length])
        starts.append(start)
    if image_token is not None:
        _number_images(rows, image_token, images)
    builder = _Builder(rows, LEAST_SHARED if least is None else least)
    builder.visit(list(range(len(rows))), 0, 0, -1)
    shown = _images_shown(rows, builder.found)
    if shown is None or all(len(each.members) == 1 for each in builder.found):
        return None

    documents = Documents((tuple((each.stop - each.start, each.parent) for each in builder.found),))
    packed = torch.tensor([token for each in builder.found for token in rows[each.row][each.start : each.stop]])
    places = torch.full(input_ids.shape, -1)
    for each, (first, last) in zip(builder.found, documents.bounds[0], strict=True):
        for member in each.members:
            begin = starts[member]
            places[member, begin + each.start : begin + each.stop] = torch.arange(first, last)
    device = input_ids.device
    return SharedRows(
        input_ids=packed.where(packed >= 0, -1 if image_token is None else image_token)[None].to(device),
        position_ids=documents.position_ids(device=device),
        documents=documents,
        places=places.to(device),
        images=tuple(shown),
        is_padded=any(len(row) < input_ids.shape[1] for row in rows),
    )


class _Found(NamedTuple):
    """A document: tokens [start, stop) of a row, which all `members` have there; parent: the document above."""

    row: int
    start: int
    stop: int
    parent: int
    members: list[int]


def _images_shown(rows: list[list[int]], found: list[_Found]) -> list[int] | None:
    """The image of each document that has one, in order; None where one would be parted."""
    shown = []
    for each in found:
        of_row = [token for token in rows[each.row] if token < 0]
        of_document = [token for token in rows[each.row][each.start : each.stop] if token < 0]
        if of_document and len(of_document) < len(of_row):
            return None
        shown += [~token for token in of_document[:1]]
    return shown


def _number_images(rows: list[list[int]], image_token: int, images: Sequence[int]) -> None:
    """Writes for each row's image token the image that it stands for, as ~number, in place."""
    with_image = [row for row in rows if image_token in row]
    if len(with_image) != len(images):
        raise ValueError(
            f"shared_rows: expected an image for each of {len(with_image)} rows with image tokens, got {len(images)}"
        )
    for row, number in zip(with_image, images):
        row[:] = [~number if token == image_token else token for token in row]


class _Builder:
    """Finds the documents of rows of tokens, in order."""

    def __init__(self, rows: list[list[int]], least: int) -> None:
        self.rows, self.least = rows, least
        self.found: list[_Found] = []

    def visit(self, members: list[int], start: int, equal: int, parent: int) -> None:
        """Documents for what `members`, alike in their first `equal` tokens, have from `start` on, below `parent`."""
        groups: dict[int | None, list[int]] = {}
        for member in members:
            row = self.rows[member]
            groups.setdefault(row[equal] if equal < len(row) else None, []).append(member)
        for token, group in groups.items():
            rows = [self.rows[member] for member in group]
            end = num_alike(rows, equal)
            if token is None and start < end and len(group) > 1 and end - start >= self.least:
                self.found.append(_Found(group[0], start, end, parent, group))
            elif token is None or len(group) == 1:
                for member, row in zip(group, rows, strict=True):
                    if start < len(row):
                        self.found.append(_Found(member, start, len(row), parent, [member]))
            elif end - start < self.least:
                self.visit(group, start, end, parent)
            else:
                self.found.append(_Found(group[0], start, end, parent, group))
                self.visit(group, end, end, len(self.found) - 1)


def num_alike(rows: list[list[int]], start: int = 0) -> int:
    """Where the first of rows that are alike up to `start` ends, or the first difference between any of them."""
    low, high = min(rows), max(rows)  # in the order of lists: no row between them is alike for less
    return next((at for at in range(start, len(low)) if at >= len(high) or low[at] != high[at]), len(low))

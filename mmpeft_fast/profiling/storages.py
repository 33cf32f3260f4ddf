"""Memory over time by what tensors are for: every storage that ops see, from its birth to its release."""

import functools
import itertools
import weakref
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

SAVED = "saved for backward"
ROLES = ("parameters", "gradients", "optimizer states", SAVED, "other")
_BEFORE = -1  # position of what was alive at the start


class Timeline(NamedTuple):
    """Bytes alive after every change. positions: how many ops had run; bytes: by role of ROLES; phases: (position,
    name) where each began."""

    positions: list[int]
    bytes: list[tuple[int, ...]]
    phases: tuple[tuple[int, str], ...] = ()

    @property
    def peak_idx(self) -> int:
        """The first moment with the most bytes alive."""
        return max(range(len(self.bytes)), key=lambda i: (sum(self.bytes[i]), -i), default=-1)

    @property
    def peak_bytes(self) -> int:
        return sum(self.bytes[self.peak_idx]) if self.bytes else 0

    def peak_by_role(self) -> dict[str, int]:
        """What holds the peak."""
        return dict(zip(ROLES, self.bytes[self.peak_idx] if self.bytes else (0,) * len(ROLES), strict=True))

    def thinned(self, num_points: int) -> "Timeline":
        """At most so many moments, of each stretch the one with the most bytes; the peak stays."""
        count = len(self.positions)
        if count <= num_points:
            return self
        bounds = [count * i // num_points for i in range(num_points + 1)]
        kept = [
            max(range(low, high), key=lambda i: (sum(self.bytes[i]), -i)) for low, high in itertools.pairwise(bounds)
        ]
        return Timeline([self.positions[i] for i in kept], [self.bytes[i] for i in kept], self.phases)


class Storages:
    """Follows storages. A storage has one role, that of what it becomes: a tensor that is saved for backward counts as
    that from its birth on, unless it was there before, so that saving it costs nothing. Scratch memory inside an op is
    not seen.

    position: how many ops have run; the owner counts.
    """

    def __init__(self):
        self.position = 0
        self._serial: dict[int, int] = {}  # address of a live storage -> its number
        self._alive: dict[int, weakref.ref] = {}
        self._roles: list[str] = []
        self._before: set[int] = set()
        self._changes: list[tuple[int, int, int]] = []  # (position, number, bytes)
        self._phases: list[tuple[int, str]] = []

    def enter(self, phase: str) -> None:
        """From here on runs this phase."""
        if not self._phases or self._phases[-1][1] != phase:
            self._phases.append((self.position, phase))

    def see(self, tensors: Iterable[Tensor], role: str = "other", *, before: bool = False) -> None:
        """Notes tensors; `before`: those not known yet were alive at the start.

        A role replaces `other`; `saved for backward` replaces nothing else, and only of what was born since.
        """
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._serial:
                self._serial[key], nbytes = len(self._roles), storage.nbytes()
                self._roles.append(role)
                if before:
                    self._before.add(self._serial[key])
                self._changes.append((_BEFORE if before else self.position, self._serial[key], nbytes))
                self._alive[key] = weakref.ref(storage, functools.partial(self._free, key, nbytes))
            elif role != "other":
                serial = self._serial[key]
                if role != SAVED or (self._roles[serial] == "other" and serial not in self._before):
                    self._roles[serial] = role

    def _free(self, key: int, nbytes: int, storage: weakref.ref) -> None:
        del self._alive[key]
        self._changes.append((self.position, self._serial.pop(key), -nbytes))

    def close(self) -> None:
        """Follows nothing any more."""
        self._alive.clear()
        self._serial.clear()

    def timeline(self) -> Timeline:
        """What was alive, from what was there before on."""
        alive, positions, points = [0] * len(ROLES), [], []
        for position, serial, nbytes in sorted(self._changes, key=lambda change: change[0]):
            alive[ROLES.index(self._roles[serial])] += nbytes
            if positions and position == positions[-1] == _BEFORE:
                points[-1] = tuple(alive)
            else:
                positions.append(position)
                points.append(tuple(alive))
        return Timeline([max(position, 0) for position in positions], points, tuple(self._phases))

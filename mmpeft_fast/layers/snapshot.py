"""Whether a tree of modules is as it was when somebody read it.

    snapshot = take(modules, lookups, reading)
    snapshot.holds(modules[0])    # True: no attribute of any of them was set, no hook added, no class patched

Compared by identity (csrc/snapshot.cpp): the class of each module, the values in its `__dict__`, the contents of dicts
and lists among those (parameters, submodules, hooks, adapters' settings), and `lookups`. What changes deeper than that
is not seen.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from mmpeft_fast.ops import csrc


class Lookup(NamedTuple):
    """`owner[name]` of a namespace (dict) or `owner.name` of anything else, and what was found there."""

    owner: object
    name: str
    found: object

    def holds(self) -> bool:
        """Whether the same object is still there."""
        owner, name, found = self
        return (owner.get(name) if isinstance(owner, dict) else getattr(owner, name, None)) is found


def take(modules: Sequence[nn.Module], lookups: Sequence[Lookup], reading: object):
    """A snapshot of these modules; None without the C++ extension: reading again is then faster than comparing.

    Args:
        modules: the first is not held on to (it is given again to `holds`), all others are.
        lookups: attributes to compare besides, with what they are now.
        reading: an object in the first module's `__dict__` that is to be overlooked: whoever holds the snapshot.
    """
    if csrc.why_unavailable() is not None:
        return None
    return csrc.extension().Snapshot(list(modules), [tuple(lookup) for lookup in lookups], reading)

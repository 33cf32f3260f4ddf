"""The base of method configurations: a frozen dataclass that turns itself into a placement of primitives."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from mmpeft_fast.fields import Bound, at_least, between, check_fields, shown
from mmpeft_fast.placement import ATTENTION_ROLES, LINEAR_ROLES, MLP_ROLES, Placement

# A rank or another inner width; no decoder's hidden size is near the upper end, and a typo is not an out-of-memory.
Width = Annotated[int, between(1, 65536)]
# Masks have a resolution of 2^-16: more than this and every element would be dropped.
Layers = tuple[int | str, ...] | int | str | None
Dropout = Annotated[float, at_least(0), Bound("below 1 - 2^-17", lambda p: p < 1 - 2**-17)]

SEPARATE_ROLES = (*ATTENTION_ROLES, *MLP_ROLES)
_LOCATIONS = {"attention": (*ATTENTION_ROLES, "qkv"), "mlp": MLP_ROLES, "both": LINEAR_ROLES}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A PEFT method with its settings. Raises ValueError for a setting of another type or out of range.

    A subclass is a frozen dataclass too. Its class attributes say how it is trained where nobody says otherwise:

    Attributes:
        learning_rate: for epochs on a pretrained model.
        small_settings: its settings in the small study, whose models are a few dozen times narrower.
        small_learning_rate: at which a few dozen steps move such a model.
    """

    learning_rate: ClassVar[float] = 2e-4
    small_settings: ClassVar[Mapping[str, Any]] = {}
    small_learning_rate: ClassVar[float] = 1e-2

    layers: Layers = None
    """Which of the decoder's layers: an index, a range such as "0-15", several of these, or None for all."""

    def __post_init__(self):
        check_fields(self, f"{type(self).__name__}.")
        self._indices()

    def adapted_layers(self, num_layers: int) -> list[int]:
        """Indices of the adapted layers, ascending, in a decoder of so many. Raises ValueError where it lacks one."""
        found = self._indices()
        if found is None:
            return list(range(num_layers))
        if found[-1] >= num_layers:
            raise ValueError(f"{type(self).__name__}.layers: expected indices below {num_layers}, got {found[-1]}")
        return found

    def _indices(self) -> list[int] | None:
        given = self.layers if isinstance(self.layers, tuple) else (self.layers,)
        if self.layers is None:
            return None
        found: list[int] = []
        for each in given:
            first, dash, last = str(each).partition("-")
            ends = [first, last] if dash else [first, first]
            if not all(end.isdecimal() and len(end) < 6 for end in ends) or int(ends[0]) > int(ends[1]):
                raise ValueError(
                    f"{type(self).__name__}.layers: expected indices or ranges such as '0-15', got {shown(each)}"
                )
            found += range(int(ends[0]), int(ends[1]) + 1)
        if not found or len(set(found)) < len(found):
            raise ValueError(
                f"{type(self).__name__}.layers: expected at least one layer and none twice, got {shown(self.layers)}"
            )
        return sorted(found)

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        """What this method places where, for a decoder layer that has `roles`."""
        raise TypeError(f"{type(self).__name__} does not say what it places")


def resolve_targets(
    targets: str | Sequence[str], allowed: Sequence[str], method: str, roles: Collection[str] = LINEAR_ROLES
) -> tuple[str, ...]:
    """Roles from a location ("attention", "mlp", "both") or a sequence of roles, limited to what the method adapts.

    A location means those of its roles that are in `roles`; a sequence is taken as it is.

    Raises:
        ValueError: unknown or repeated role, or nothing left.
    """
    if isinstance(targets, str):
        if targets not in _LOCATIONS:
            raise ValueError(f"{method}: expected targets in {sorted(_LOCATIONS)} or a list of roles, got {targets!r}")
        roles = tuple(role for role in _LOCATIONS[targets] if role in allowed and role in roles)
    else:
        roles = tuple(targets)
        unknown = [role for role in roles if role not in allowed]
        if unknown:
            raise ValueError(f"{method}: unknown roles {unknown}; expected roles in {list(allowed)}")
    if not roles or len(set(roles)) != len(roles):
        raise ValueError(f"{method}: expected at least one role and none twice, got {list(roles)}")
    return roles

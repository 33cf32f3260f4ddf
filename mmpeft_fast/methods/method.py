"""The base of method configurations: a frozen dataclass that turns itself into a placement of primitives."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mmpeft_fast.layers.plan import ATTENTION_ROLES, LINEAR_ROLES, MLP_ROLES, Plan

SEPARATE_ROLES = (*ATTENTION_ROLES, *MLP_ROLES)
_LOCATIONS = {"attention": (*ATTENTION_ROLES, "qkv"), "mlp": MLP_ROLES, "both": LINEAR_ROLES}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A PEFT method with its settings."""

    def plan(self, roles: Collection[str] = SEPARATE_ROLES) -> Plan:
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


def check_number(
    method: str, name: str, value: object, *, low: float, high: float | None = None, integer=False
) -> None:
    """Raises ValueError unless low <= value (< high where given)."""
    fits = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    if not fits or not value >= low or (high is not None and not value < high):
        kind = "an integer" if integer else "a number"
        bounds = f">= {low}" if high is None else f"in [{low}, {high})"
        raise ValueError(f"{method}: expected {name} to be {kind} {bounds}, got {value!r}")

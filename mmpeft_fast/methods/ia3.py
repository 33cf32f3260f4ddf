"""IA3 (Liu et al. 2022, section 3.3): k and v are scaled after, the MLP's inner activation before its linear layer."""

from collections.abc import Collection
from dataclasses import dataclass

from mmpeft_fast.methods.method import SEPARATE_ROLES, Method, resolve_targets
from mmpeft_fast.placement import LINEAR_ROLES, Placement

_INPUT_ROLES = ("down",)


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """A trained vector of ones on each target: on the input of `down`, on the output (bias included) of all others.

    Attributes:
        targets: "attention" (k, v), "mlp" (down), "both", or any roles.
    """

    small_learning_rate = 1e-1

    targets: str | tuple[str, ...] = ("k", "v", "down")

    def __post_init__(self):
        super().__post_init__()
        self._resolve(LINEAR_ROLES)

    def _resolve(self, roles: Collection[str]) -> tuple[str, ...]:
        # The named locations mean IA3's own sites; an explicit list may name any role.
        allowed = ("k", "v", "down") if isinstance(self.targets, str) else LINEAR_ROLES
        return resolve_targets(self.targets, allowed, "IA3", roles)

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        return Placement(scales={role: "input" if role in _INPUT_ROLES else "output" for role in self._resolve(roles)})

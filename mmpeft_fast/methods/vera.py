"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2): one random pair of matrices for all layers, two vectors a
layer."""

from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType

from mmpeft_fast.methods.method import SEPARATE_ROLES, Dropout, Method, Width, resolve_targets
from mmpeft_fast.placement import LINEAR_ROLES, BranchPlacement, Placement


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """y = W x + b + l_b * U (l_d * D drop(x)): D and U random and frozen, one pair for all targets, each of which takes
    as many columns and rows as it is wide; l_d [r] and l_b [out] trained. A target trains r + out numbers.

    Attributes:
        r: rank.
        d_initial: what l_d begins at; l_b begins at zero.
        projection_seed: D and U are drawn from a generator with this seed, as in HF PEFT.
        dropout: on the branch's input, in [0, 1).
        targets: "attention", "mlp", "both", or roles among q, k, v (or qkv), o, gate, up, down.
    """

    learning_rate = 2e-3
    small_settings = MappingProxyType({"r": 64})
    small_learning_rate = 5e-2

    r: Width = 256
    d_initial: float = 0.1
    projection_seed: int = 0
    dropout: Dropout = 0.0
    targets: str | tuple[str, ...] = "both"

    def __post_init__(self):
        super().__post_init__()
        resolve_targets(self.targets, LINEAR_ROLES, "VeRA")

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        branch = BranchPlacement(
            position="parallel", rank=self.r, dropout=self.dropout, frozen=("down", "up"),
            projection_seed=self.projection_seed, vectors=self.d_initial,
        )  # fmt: skip
        return Placement(branches=dict.fromkeys(resolve_targets(self.targets, LINEAR_ROLES, "VeRA", roles), branch))

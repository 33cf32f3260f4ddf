"""LoRA (Hu et al. 2021, eq. 3): y = W x + (alpha / r) B A drop(x), A Kaiming, B zero."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from mmpeft_fast.fields import at_least
from mmpeft_fast.methods.method import SEPARATE_ROLES, Dropout, Method, Width, resolve_targets
from mmpeft_fast.placement import LINEAR_ROLES, BranchPlacement, Placement


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """A parallel branch with f = identity on each target; defaults are the study's.

    Attributes:
        r: rank.
        alpha: numerator of the scaling alpha / r.
        dropout: on the branch's input, in [0, 1).
        targets: "attention", "mlp", "both", or roles among q, k, v (or qkv), o, gate, up, down.
        rank_stabilized: scaling alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023).
        independent_masks: one dropout mask a site, as in HF PEFT; otherwise sites that share an input share a mask,
            which has the same distribution for each of them and costs one skinny GEMM instead of several.
    """

    small_settings = MappingProxyType({"r": 16, "alpha": 32})
    small_learning_rate = 5e-3

    r: Width = 128
    alpha: Annotated[float, at_least(0)] = 256
    dropout: Dropout = 0.05
    targets: str | tuple[str, ...] = "both"
    rank_stabilized: bool = False
    independent_masks: bool = False

    def __post_init__(self):
        super().__post_init__()
        resolve_targets(self.targets, LINEAR_ROLES, "LoRA")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        return Placement(
            branches={
                role: BranchPlacement(
                    position="parallel",
                    rank=self.r,
                    scaling=self.scaling,
                    dropout=self.dropout,
                    stream=LINEAR_ROLES.index(role) if self.independent_masks else 0,
                )
                for role in resolve_targets(self.targets, LINEAR_ROLES, "LoRA", roles)
            }
        )

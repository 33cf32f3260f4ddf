"""MSPLoRA (Zhao et al. 2025, arXiv 2503.21838): one LoRA of all layers, one of a group, one of the layer."""

from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from mmpeft_fast.fields import Bound, at_least, between
from mmpeft_fast.methods.lora import LoRA
from mmpeft_fast.methods.method import SEPARATE_ROLES, Dropout, Method, Width, resolve_targets
from mmpeft_fast.placement import LINEAR_ROLES, BranchPlacement, Placement


@dataclass(frozen=True, kw_only=True)
class MSPLoRA(Method):
    """Three parallel branches a target, of ranks r, r / 2 and r / 4 and scalings alpha over each one's rank.

    With n adapted layers and g = ceil(n / group_layers) groups a role trains r (1 + g / 2 + n / 4) (in + out) numbers.

    Attributes:
        r: rank of what all layers share, a multiple of 4.
        alpha: numerator of each part's scaling.
        group_layers: so many consecutive adapted layers are a group (the paper's mid level); the last one may be
            smaller.
        dropout: on the branches' input, in [0, 1); the three see the same mask.
        targets: "attention", "mlp", "both", or roles among q, k, v (or qkv), o, gate, up, down.
    """

    small_settings = MappingProxyType({"r": 16, "alpha": 32, "group_layers": 2})
    small_learning_rate = LoRA.small_learning_rate

    r: Annotated[Width, Bound("divisible by 4", lambda r: r % 4 == 0)] = 64
    alpha: Annotated[float, at_least(0)] = 16
    group_layers: Annotated[int, between(1, 65536)] = 8
    dropout: Dropout = 0.05
    targets: str | tuple[str, ...] = "both"

    def __post_init__(self):
        super().__post_init__()
        resolve_targets(self.targets, LINEAR_ROLES, "MSPLoRA")

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        def part(rank: int, layers: int) -> BranchPlacement:
            return BranchPlacement(
                position="parallel", rank=rank, scaling=self.alpha / rank, dropout=self.dropout,
                down_layers=layers, up_layers=layers,
            )  # fmt: skip

        parts = (part(self.r, 0), part(self.r // 2, self.group_layers), part(self.r // 4, 1))
        return Placement(branches=dict.fromkeys(resolve_targets(self.targets, LINEAR_ROLES, "MSPLoRA", roles), parts))

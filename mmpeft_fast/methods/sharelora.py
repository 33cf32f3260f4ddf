"""ShareLoRA (Song et al. 2024, arXiv 2406.10785): LoRA whose D, U or both are one matrix for all layers of a role."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated

from mmpeft_fast.fields import at_least, one_of
from mmpeft_fast.methods.lora import LoRA
from mmpeft_fast.methods.method import SEPARATE_ROLES, Width
from mmpeft_fast.placement import Placement


@dataclass(frozen=True, kw_only=True)
class ShareLoRA(LoRA):
    """LoRA with shared tensors; n adapted layers train, a role, r (in + n out) numbers with D shared, r (n in + out)
    with U shared, r (in + out) with both.

    Attributes:
        shared: "down" (the paper's ShareA), "up" or "both".
    """

    r: Width = 64
    alpha: Annotated[float, at_least(0)] = 16
    shared: Annotated[str, one_of("down", "up", "both")] = "down"

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        def over(name: str) -> int:
            return 0 if self.shared in (name, "both") else 1

        return Placement(
            branches={
                role: replace(branch, down_layers=over("down"), up_layers=over("up"))
                for role, branch in super().place(roles).branches.items()
            }
        )

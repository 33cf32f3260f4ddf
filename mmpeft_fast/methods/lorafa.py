"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303): LoRA whose D stays as it was drawn."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from mmpeft_fast.methods.lora import LoRA
from mmpeft_fast.methods.method import SEPARATE_ROLES
from mmpeft_fast.placement import Placement


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA with D frozen: a target trains r out numbers, and of its input nothing is kept for a gradient of D."""

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        branches = super().place(roles).branches
        return Placement(branches={role: replace(branch, frozen=("down",)) for role, branch in branches.items()})

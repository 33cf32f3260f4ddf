"""DoRA (Liu et al. 2024, arXiv 2402.09353, eq. 5): LoRA for the direction of a weight's rows, a vector for their
magnitude."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from mmpeft_fast.methods.lora import LoRA
from mmpeft_fast.methods.method import SEPARATE_ROLES, Dropout
from mmpeft_fast.placement import Placement


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """y = m / |W + s U D| * (W x + s U D drop(x)) + b, norms by row and no gradient through them (section 4.3); m [out]
    begins at the norms of W's rows.

    A target trains r (in + out) + out numbers. The dropout is on the branch's input; HF PEFT drops what the base weight
    sees as well, so the two are the same without dropout alone, and in evaluation.
    """

    dropout: Dropout = 0.0

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        placement = super().place(roles)
        return replace(placement, scales=dict.fromkeys(placement.branches, "magnitude"))

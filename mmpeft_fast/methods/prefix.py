"""Prefix-tuning (Li & Liang 2021): trainable keys and values in front of every layer's own."""

from collections.abc import Collection
from dataclasses import dataclass

from mmpeft_fast.methods.method import SEPARATE_ROLES, Method, Width
from mmpeft_fast.placement import Placement, PrefixPlacement


@dataclass(frozen=True, kw_only=True)
class Prefix(Method):
    """P virtual tokens a layer, not rotated; text positions start at P.

    Attributes:
        num_virtual_tokens: P.
        projection: keys and values come from an embedding through Linear, tanh, Linear (the study's LLaVA setting).
        projection_width: inner width of that; the decoder's hidden size when None.
    """

    learning_rate = 1e-5
    small_learning_rate = 3e-1

    num_virtual_tokens: Width = 20
    projection: bool = False
    projection_width: Width | None = None

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        return Placement(
            prefix=PrefixPlacement(
                num_virtual_tokens=self.num_virtual_tokens,
                projection=self.projection,
                projection_width=self.projection_width,
            )
        )

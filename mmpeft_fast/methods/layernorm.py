"""Tuning LayerNorm in attention (arXiv 2312.11420): the two norms of every block, and what the paper trains beside."""

from collections.abc import Collection
from dataclasses import dataclass

from mmpeft_fast.methods.method import SEPARATE_ROLES, Method
from mmpeft_fast.placement import Placement


@dataclass(frozen=True, kw_only=True)
class LayerNorm(Method):
    """The gains of every block's norms; alone this is the paper's LayerNorm-simp.

    Attributes:
        final: the norm after the last block too (as in HF PEFT's LN-tuning).
        connector, embeddings, head: these parts are trained as well (all three: the paper's LayerNorm).
    """

    final: bool = False
    connector: bool = False
    embeddings: bool = False
    head: bool = False

    @property
    def small_learning_rate(self) -> float:
        """Matrices, where there are any, do not bear the rate of gains."""
        return 3e-3 if self.embeddings or self.head else 1e-1

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        norms = ("input_norm", "post_attention_norm") + (("final_norm",) if self.final else ())
        parts = tuple(part for part in ("connector", "embeddings", "head") if getattr(self, part))
        return Placement(gains=norms, parts=parts)

"""Bottleneck adapters: the study's series form (arXiv 2406.05130) and LLM-Adapters' parallel one (Hu et al. 2023).

series:   pre  y = W (x + s U f(D drop x)) + b  on q, k, v (or qkv), gate, up
          post y = z + s U f(D drop z), z = W x + b  on o, down
parallel: y = W x + b + s U f(D drop x)
"""

from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from mmpeft_fast.fields import at_least, check_value, one_of
from mmpeft_fast.methods.method import SEPARATE_ROLES, Dropout, Method, Width, resolve_targets
from mmpeft_fast.placement import INITS, LINEAR_ROLES, BranchPlacement, Placement

_POST_ROLES = ("o", "down")


@dataclass(frozen=True, kw_only=True)
class Adapter(Method):
    """A bottleneck with activation f on each target; defaults are the study's.

    Attributes:
        bottleneck: width b of D [b, in] and U [out, b], no biases.
        activation: f.
        dropout: on the bottleneck's input, in [0, 1).
        scaling: s.
        targets: "attention", "mlp", "both", or roles.
        placement: "series" or "parallel".
        init: "bert" (both N(0, 0.02): not the identity at step 0) or "kaiming" (D Kaiming, U zero; `mam_adapter`).
    """

    learning_rate = 5e-5
    small_settings = MappingProxyType({"bottleneck": 16})
    small_learning_rate = 1e-2

    bottleneck: Width = 256
    activation: str = "tanh"
    dropout: Dropout = 0.05
    scaling: Annotated[float, at_least(0)] = 1.0
    targets: str | tuple[str, ...] = "mlp"
    placement: Annotated[str, one_of("series", "parallel")] = "series"
    init: Annotated[str, one_of(*INITS)] = "bert"

    def __post_init__(self):
        from mmpeft_fast.ops.activations import ACTIVATIONS  # torch, which a list of the methods does not wait for

        super().__post_init__()
        check_value("Adapter.activation", self.activation, Annotated[str, one_of(*ACTIVATIONS)])
        resolve_targets(self.targets, LINEAR_ROLES, "Adapter")

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        def position(role: str) -> str:
            if self.placement == "parallel":
                return "parallel"
            return "post" if role in _POST_ROLES else "pre"

        return Placement(
            branches={
                role: BranchPlacement(
                    position=position(role),
                    rank=self.bottleneck,
                    scaling=self.scaling,
                    activation=self.activation,
                    dropout=self.dropout,
                    init=self.init,
                )
                for role in resolve_targets(self.targets, LINEAR_ROLES, "Adapter", roles)
            }
        )

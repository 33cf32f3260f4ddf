"""MOELoRA (Liu et al. 2023, arXiv 2310.18339): low-rank experts, weighted for each sample by what its task is."""

from collections.abc import Collection
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from mmpeft_fast.fields import at_least
from mmpeft_fast.methods.lora import LoRA
from mmpeft_fast.methods.method import SEPARATE_ROLES, Dropout, Method, Width, resolve_targets
from mmpeft_fast.placement import LINEAR_ROLES, BranchPlacement, Placement, TaskPlacement


@dataclass(frozen=True, kw_only=True)
class MOELoRA(Method):
    """y = W x + b + (alpha / r) sum_e w_e U_e D_e drop(x), w = softmax(G e) over experts, e [task_width] the trained
    embedding of the sample's task (`task_ids` [B] among the model's arguments), G of the target's own.

    A target trains r (in + out) + experts task_width numbers, the tasks num_tasks task_width. r and experts are the
    paper's. The weights depend on the task, so nothing can be merged.

    Attributes:
        r: rank of all experts together, a multiple of `experts`.
        experts: how many, each of rank r / experts.
        alpha: numerator of the scaling alpha / r.
        num_tasks, task_width: of the embedding.
        dropout: on the branch's input, in [0, 1); all experts see the same mask.
        targets: "attention", "mlp", "both", or roles among q, k, v (or qkv), o, gate, up, down.
    """

    small_settings = MappingProxyType({"r": 16, "alpha": 32, "experts": 4, "num_tasks": 2, "task_width": 16})
    small_learning_rate = LoRA.small_learning_rate

    r: Width = 16
    experts: Width = 8
    alpha: Annotated[float, at_least(0)] = 32
    num_tasks: Width = 8
    task_width: Width = 64
    dropout: Dropout = 0.05
    targets: str | tuple[str, ...] = "both"

    def __post_init__(self):
        super().__post_init__()
        if self.r % self.experts:
            raise ValueError(f"MOELoRA.r: expected a multiple of the {self.experts} experts, got {self.r}")
        resolve_targets(self.targets, LINEAR_ROLES, "MOELoRA")

    def place(self, roles: Collection[str] = SEPARATE_ROLES) -> Placement:
        branch = BranchPlacement(
            position="parallel", rank=self.r, scaling=self.alpha / self.r, dropout=self.dropout, experts=self.experts
        )
        return Placement(
            branches=dict.fromkeys(resolve_targets(self.targets, LINEAR_ROLES, "MOELoRA", roles), branch),
            tasks=TaskPlacement(num_tasks=self.num_tasks, width=self.task_width),
        )

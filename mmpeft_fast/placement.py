"""What a method asks for: a placement of the four primitives on roles of a decoder layer, free of any model.

A method file builds a `Placement`; a family file says which module plays which role; `peft_model` brings the two
together.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# A decoder has q, k and v, or one qkv that is all three.
LINEAR_ROLES = ("q", "k", "v", "o", "gate", "up", "down", "qkv")
ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("gate", "up", "down")
NORM_ROLES = ("input_norm", "post_attention_norm", "final_norm")
PARTS = ("connector", "embeddings", "head")

# kaiming: down Kaiming-uniform, up zero (LoRA; LLM-Adapters' `mam_adapter`). bert: both N(0, 0.02) (study's Adapter).
INITS = ("kaiming", "bert")
SCALES = ("input", "output", "magnitude")


@dataclass(frozen=True, kw_only=True)
class BranchPlacement:
    """A bottleneck branch `scaling * U f(D drop(.))` of rank `rank`.

    down_layers, up_layers: so many consecutive adapted layers share one D, one U; 0: all of them.
    frozen: which of "down" and "up" are not trained.
    projection_seed: D and U are one pair for all layers and roles, as wide as the widest needs, drawn from a generator
        with this seed (Kaiming-uniform, gain sqrt 2); each linear takes the first columns of D, the first rows of U.
    vectors: the branch is `scaling * l_b * U f(l_d * D drop(.))` with trained l_d [R], which begins at this value, and
        l_b [N], which begins at zero; None: without them.
    experts: so many blocks of neighbouring ranks are weighted by a softmax over them of G e, with a trained G
        [experts, width] and the embedding e of the sample's task (`Placement.tasks`); 0: none is.
    """

    position: str
    rank: int
    scaling: float = 1.0
    activation: str = "identity"
    dropout: float = 0.0
    init: str = "kaiming"
    stream: int = 0
    down_layers: int = 1
    up_layers: int = 1
    frozen: tuple[str, ...] = ()
    projection_seed: int | None = None
    vectors: float | None = None
    experts: int = 0


@dataclass(frozen=True, kw_only=True)
class PrefixPlacement:
    """`num_virtual_tokens` trainable keys and values a layer; with `projection` they come from an embedding through
    Linear, tanh, Linear of inner width `projection_width` (the decoder's hidden size when None)."""

    num_virtual_tokens: int
    projection: bool = False
    projection_width: int | None = None


@dataclass(frozen=True, kw_only=True)
class TaskPlacement:
    """A trained embedding [num_tasks, width] of what a sample is for, which branches with experts read."""

    num_tasks: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A branch, or several side by side, and a scale (one of `SCALES`) by linear role; norm roles whose gain is
    trained; and whole parts of the model that are trained besides.

    A scale on the input or the output begins at ones. A magnitude m takes the place of the lengths of the rows of the
    weights, branches included: y = m / |W + sum s U D| * (W x + sum s U D x) + b, beginning at the lengths of W's.
    """

    branches: Mapping[str, BranchPlacement | tuple[BranchPlacement, ...]] = field(default_factory=dict)
    scales: Mapping[str, str] = field(default_factory=dict)
    prefix: PrefixPlacement | None = None
    tasks: TaskPlacement | None = None
    gains: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def branches_of(self, role: str) -> tuple[BranchPlacement, ...]:
        found = self.branches[role]
        return (found,) if isinstance(found, BranchPlacement) else tuple(found)

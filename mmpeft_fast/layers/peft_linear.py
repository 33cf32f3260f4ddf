"""A linear layer with PEFT primitives attached: the eager definition of every method but prefix and norm tuning.

y = post( (W pre(x * l_in) + b + parallel(x * l_in)) * l_out ),   branch(h) = s U f(D drop(h))
"""

import math

import torch
from torch import Tensor, nn

from mmpeft_fast.ops.activations import ACTIVATIONS, accumulate_dtype
from mmpeft_fast.ops.segments import Branch, Segment
from mmpeft_fast.placement import BranchPlacement


class Bottleneck(nn.Module):
    """One branch: `down` [R, K] and `up` [N, R], trained, in at least float32.

    Args:
        in_features, out_features: K and N of the branch itself (pre: K -> K, post: N -> N).
        placement: position, rank, scaling, activation, dropout and initialisation.
        dtype, device: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        placement: BranchPlacement,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ):
        super().__init__()
        self.placement = placement
        options = {"dtype": dtype, "device": device}
        self.down = nn.Parameter(torch.empty(placement.rank, in_features, **options))
        self.up = nn.Parameter(torch.empty(out_features, placement.rank, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.placement.init == "bert":
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            nn.init.zeros_(self.up)

    def forward(self, h: Tensor) -> Tensor:
        """The branch's contribution [..., N] to add, from h [..., K]."""
        kept = nn.functional.dropout(h, self.placement.dropout, self.training)
        a = kept @ self.down.to(h.dtype).t()
        return self.placement.scaling * (ACTIVATIONS[self.placement.activation].function(a) @ self.up.to(h.dtype).t())

    def branch(self) -> Branch:
        """This branch as the fused op takes it; dropout only while training."""
        place = self.placement
        dropout = place.dropout if self.training else 0.0
        return Branch(self.down, self.up, place.scaling, place.activation, place.position, dropout, place.stream)

    def extra_repr(self) -> str:
        place = self.placement
        return f"{place.position}, rank={place.rank}, scaling={place.scaling}, {place.activation}, p={place.dropout}"


class PeftLinear(nn.Linear):
    """A frozen `nn.Linear` with branches and scales; names of its own parameters stay `weight` and `bias`.

    Made from a linear layer in place by `PeftLinear.convert`; `forward` is the eager definition. plain: the class that
    it is without branches and scales, whose forward is W h + b.
    """

    plain: type[nn.Linear] = nn.Linear
    branches: nn.ModuleList
    in_scale: nn.Parameter | None
    out_scale: nn.Parameter | None

    @classmethod
    def convert(cls, linear: nn.Linear) -> "PeftLinear":
        """Turns this instance into a PeftLinear without branches or scales; a PeftLinear is returned as it is.

        Raises:
            ValueError: not a plain `nn.Linear`, nor a class of `register_base` (sharded or wrapped layers cannot carry
                branches).
        """
        if isinstance(linear, PeftLinear):
            return linear
        if not can_carry(linear):
            raise ValueError(f"add_peft: expected a plain torch.nn.Linear to adapt, got {type(linear).__name__}")
        linear.__class__ = _KINDS[type(linear)]
        linear.branches = nn.ModuleList()
        linear.register_parameter("in_scale", None)
        linear.register_parameter("out_scale", None)
        return linear

    def add_branch(self, placement: BranchPlacement) -> Bottleneck:
        in_features = self.out_features if placement.position == "post" else self.in_features
        out_features = self.in_features if placement.position == "pre" else self.out_features
        branch = Bottleneck(in_features, out_features, placement, **self._like())
        self.branches.append(branch.train(self.training))
        return branch

    def add_scale(self, where: str) -> None:
        """A trained vector of ones on the input or the output, as in IA3."""
        width = self.in_features if where == "input" else self.out_features
        scale = nn.Parameter(torch.ones(width, **self._like()))
        setattr(self, "in_scale" if where == "input" else "out_scale", scale)

    def _like(self) -> dict:
        """Dtype and device of what is trained: at least float32, also where the weight is packed into bytes."""
        wide = accumulate_dtype(self.weight.dtype) if self.weight.is_floating_point() else torch.float32
        return {"dtype": wide, "device": self.weight.device}

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.in_scale is None else (x * self.in_scale).to(x.dtype)
        at = {
            position: [b for b in self.branches if b.placement.position == position]
            for position in ("pre", "parallel", "post")
        }
        y = self.plain.forward(self, sum((branch(h) for branch in at["pre"]), h))
        y = sum((branch(h) for branch in at["parallel"]), y)
        y = y if self.out_scale is None else (y * self.out_scale).to(y.dtype)
        return sum((branch(y) for branch in at["post"]), y)

    def segment(self) -> Segment:
        """This layer as the fused op takes it, where its weight is a plain tensor."""
        return self.on(Segment(self.weight, self.bias))

    def on(self, base: Segment) -> Segment:
        """`base` with this layer's branches and output scale."""
        return base._replace(branches=tuple(branch.branch() for branch in self.branches), out_scale=self.out_scale)


# The classes that can carry branches and scales, and what they become.
_KINDS: dict[type[nn.Linear], type[PeftLinear]] = {nn.Linear: PeftLinear}


def register_base(plain: type[nn.Linear], kind: type[PeftLinear]) -> None:
    """Lets layers of exactly the class `plain` carry branches and scales, as a `kind`."""
    _KINDS[plain] = kind


def can_carry(linear: nn.Module) -> bool:
    """Whether `PeftLinear.convert` takes a layer."""
    return isinstance(linear, PeftLinear) or type(linear) in _KINDS

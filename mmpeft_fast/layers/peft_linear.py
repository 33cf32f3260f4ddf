"""A linear layer with PEFT primitives attached: the eager definition of every method but prefix and norm tuning.

y = post( (W pre(x * l_in) + b + parallel(x * l_in)) * l_out ),   branch(h) = s l_b U f(l_d D drop(h))

With a magnitude m, W and the parallel branches are scaled by m / |W + sum s U D| before the bias is added.
"""

import math

import torch
from torch import Tensor, nn

from mmpeft_fast.layers.tasks import TaskGate
from mmpeft_fast.ops.activations import ACTIVATIONS, accumulate_dtype
from mmpeft_fast.ops.row_norms import row_norms
from mmpeft_fast.ops.segments import Branch, Segment
from mmpeft_fast.placement import BranchPlacement


class Bottleneck(nn.Module):
    """One branch: `down` [R, K] and `up` [N, R], and where the placement has vectors `inner` [R] and `outer` [N], in at
    least float32; trained, but for what the placement freezes.

    Args:
        in_features, out_features: K and N of the branch itself (pre: K -> K, post: N -> N).
        placement: position, rank, scaling, activation, dropout and initialisation.
        dtype, device: of the parameters.
        shared: takes `down` and `up` of this one, which may be wider: the first K columns and N rows are used.
        widths: (K, N) of `down` and `up` themselves, where they are wider.
        task_gate: what weights the experts, where the placement has some, by `router` [experts, width].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        placement: BranchPlacement,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shared: "Bottleneck | None" = None,
        widths: tuple[int, int] | None = None,
        task_gate: TaskGate | None = None,
    ):
        super().__init__()
        self.placement, self.in_features, self.out_features = placement, in_features, out_features
        options = {"dtype": dtype, "device": device}
        if shared is None:
            width_in, width_out = widths or (in_features, out_features)
            self.down = nn.Parameter(torch.empty(placement.rank, width_in, **options))
            self.up = nn.Parameter(torch.empty(width_out, placement.rank, **options))
            self.reset_parameters()
        else:
            self.down, self.up = shared.down, shared.up
        self.inner = self.outer = None
        if placement.vectors is not None:
            self.inner = nn.Parameter(torch.full((placement.rank,), placement.vectors, **options))
            self.outer = nn.Parameter(torch.zeros(out_features, **options))
        self.router, self.task_gate = None, task_gate
        if placement.experts:
            width = task_gate.tasks.embedding.embedding_dim
            self.router = nn.Parameter(torch.empty(placement.experts, width, **options))
            nn.init.kaiming_uniform_(self.router, a=math.sqrt(5))
        for name in placement.frozen:
            getattr(self, name).requires_grad_(False)

    def reset_parameters(self) -> None:
        if self.placement.projection_seed is not None:  # the same numbers on every device
            generator = torch.Generator("cpu").manual_seed(self.placement.projection_seed)
            with torch.no_grad():
                for matrix in (self.down, self.up):
                    bound = math.sqrt(6 / matrix.shape[1])
                    drawn = torch.empty(matrix.shape, dtype=torch.float32, device="cpu")
                    matrix.copy_(drawn.uniform_(-bound, bound, generator=generator))
        elif self.placement.init == "bert":
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)
        else:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            nn.init.zeros_(self.up)

    def forward(self, h: Tensor) -> Tensor:
        """The branch's contribution [..., N] to add, from h [..., K]."""
        kept = nn.functional.dropout(h, self.placement.dropout, self.training)
        a = kept @ self.down[:, : self.in_features].to(h.dtype).t()
        a = a if self.inner is None else a * self.inner.to(h.dtype)
        z = ACTIVATIONS[self.placement.activation].function(a)
        if self.router is not None:
            z = (z.unflatten(-1, (self.placement.experts, -1)) * self.gate()[..., None]).flatten(-2).to(z.dtype)
        y = self.placement.scaling * (z @ self.up[: self.out_features].to(h.dtype).t())
        return y if self.outer is None else y * self.outer.to(h.dtype)

    def gate(self) -> Tensor | None:
        """The experts' weights in this call [B or 1, 1, experts]."""
        return None if self.router is None else self.task_gate(self.router)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """D [R, K] and U [N, R] as they are multiplied: the parameters, or made of them."""
        down, up = self.down, self.up
        if down.shape[1] > self.in_features:
            down = down[:, : self.in_features]
        if up.shape[0] > self.out_features:
            up = up[: self.out_features]
        return (down, up) if self.inner is None else (down * self.inner[:, None], up * self.outer[:, None])

    def branch(self) -> Branch:
        """This branch as the fused op takes it; dropout only while training."""
        place = self.placement
        dropout = place.dropout if self.training else 0.0
        how = place.scaling, place.activation, place.position, dropout, place.stream
        return Branch(*self.matrices(), *how, self.gate())

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
    magnitude: nn.Parameter | None

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
        linear.carry_nothing()
        return linear

    def carry_nothing(self) -> None:
        """Makes the places for branches and scales, without any."""
        self.branches = nn.ModuleList()
        for name in ("in_scale", "out_scale", "magnitude"):
            self.register_parameter(name, None)

    def add_branch(self, placement: BranchPlacement, **around) -> Bottleneck:
        """around: what the branch shares with others, as `Bottleneck` takes it."""
        in_features = self.out_features if placement.position == "post" else self.in_features
        out_features = self.in_features if placement.position == "pre" else self.out_features
        branch = Bottleneck(in_features, out_features, placement, **self._like(), **around)
        self.branches.append(branch.train(self.training))
        return branch

    def add_scale(self, where: str) -> None:
        """A trained vector: ones on the input or the output, as in IA3; the magnitude of each row of the weight."""
        if where == "magnitude":
            with torch.no_grad():
                norms = torch.linalg.vector_norm(self.dense_weight(), dim=1, dtype=self._like()["dtype"])
            self.magnitude = nn.Parameter(norms)
            return
        width = self.in_features if where == "input" else self.out_features
        scale = nn.Parameter(torch.ones(width, **self._like()))
        setattr(self, "in_scale" if where == "input" else "out_scale", scale)

    def _like(self) -> dict:
        """Dtype and device of what is trained: at least float32, also where the weight is packed into bytes."""
        wide = accumulate_dtype(self.weight.dtype) if self.weight.is_floating_point() else torch.float32
        return {"dtype": wide, "device": self.weight.device}

    def dense_weight(self) -> Tensor:
        """W [N, K] as a tensor."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.in_scale is None else (x * self.in_scale).to(x.dtype)
        at = {
            position: [b for b in self.branches if b.placement.position == position]
            for position in ("pre", "parallel", "post")
        }
        y = self.plain.forward(self, sum((branch(h) for branch in at["pre"]), h))
        y = sum((branch(h) for branch in at["parallel"]), y)
        if self.magnitude is not None:
            bias = 0.0 if self.bias is None else self.bias
            y = ((y - bias) * (self.magnitude / self._lengths()) + bias).to(y.dtype)
        y = y if self.out_scale is None else (y * self.out_scale).to(y.dtype)
        return sum((branch(y) for branch in at["post"]), y)

    def segment(self) -> Segment:
        """This layer as the fused op takes it, where its weight is a plain tensor."""
        return self.on(Segment(self.weight, self.bias))

    def on(self, base: Segment) -> Segment:
        """`base` with this layer's branches and output scale."""
        segment = base._replace(branches=tuple(branch.branch() for branch in self.branches), out_scale=self.out_scale)
        return segment if self.magnitude is None else self._directed(segment)

    @torch.no_grad()
    def _lengths(self) -> Tensor:
        """|W + sum s U D| by row, as it is defined; a constant to autograd (DoRA, section 4.3)."""
        weight = self.dense_weight().to(self.magnitude.dtype)
        for branch in self.branches:
            down, up = branch.matrices()
            weight = weight + branch.placement.scaling * up @ down
        return weight.norm(dim=1)

    def _directed(self, segment: Segment) -> Segment:
        """The same by an output scale, which the op puts on the bias as well: it is divided out there."""
        with torch.no_grad():
            down = torch.cat([branch.down for branch in segment.branches])
            up = torch.cat([branch.scaling * branch.up for branch in segment.branches], dim=1)
        direction = self.magnitude / row_norms(self.dense_weight(), down, up, 1.0)
        bias = None if segment.bias is None else (segment.bias / direction).to(segment.bias.dtype)
        return segment._replace(bias=bias, out_scale=direction)


# The classes that can carry branches and scales, and what they become.
_KINDS: dict[type[nn.Linear], type[PeftLinear]] = {nn.Linear: PeftLinear}


def register_base(plain: type[nn.Linear], kind: type[PeftLinear]) -> None:
    """Lets layers of exactly the class `plain` carry branches and scales, as a `kind`."""
    _KINDS[plain] = kind


def can_carry(linear: nn.Module) -> bool:
    """Whether `PeftLinear.convert` takes a layer."""
    return isinstance(linear, PeftLinear) or type(linear) in _KINDS

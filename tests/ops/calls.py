"""Calls of `fused_linear` with random tensors, described by what is in them."""

from dataclasses import dataclass, field

import torch

from mmpeft_fast.ops.segments import Branch, Segment


@dataclass
class Call:
    x: tuple[torch.Tensor, ...]
    segments: list[Segment]
    options: dict = field(default_factory=dict)

    def arguments(self):
        return (self.x if len(self.x) > 1 else self.x[0]), self.segments

    def named_tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"x{i}": part for i, part in enumerate(self.x)}
        for i, seg in enumerate(self.segments):
            tensors |= {f"{i}.weight": seg.weight, f"{i}.bias": seg.bias, f"{i}.out_scale": seg.out_scale}
            for j, branch in enumerate(seg.branches):
                parts = {"down": branch.down, "up": branch.up, "gate": branch.gate}
                tensors |= {f"{i}.{branch.position}{j}.{name}": tensor for name, tensor in parts.items()}
        tensors |= {name: self.options.get(name) for name in ("gain", "in_scale", "residual")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def map(self, function) -> "Call":
        """The same call with every tensor but the seed replaced."""

        def of(tensor):
            return None if tensor is None else function(tensor)

        segments = [
            Segment(
                of(seg.weight),
                of(seg.bias),
                tuple(
                    branch._replace(down=of(branch.down), up=of(branch.up), gate=of(branch.gate))
                    for branch in seg.branches
                ),
                of(seg.out_scale),
            )
            for seg in self.segments
        ]
        options = {
            name: of(value) if name in ("gain", "in_scale", "residual") else value
            for name, value in self.options.items()
        }
        return Call(tuple(of(part) for part in self.x), segments, options)


def make_call(
    *,
    prologue="none",
    positions=(),
    activation="identity",
    bias=False,
    out_scale=False,
    in_scale=False,
    residual=False,
    num_segments=1,
    dropout=0.0,
    gate=None,
    lead=(2, 2),
    width=6,
    num_out=5,
    rank=2,
    dtype=torch.float64,
    seed=0,
) -> Call:
    """gate: sizes of each branch's, the last of which divides the rank; None: without."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()

    def matrix(rows, cols):  # outputs of the scale of inputs, as trained layers have
        return (
            (torch.randn(rows, cols, dtype=torch.float64, generator=generator) / cols**0.5).to(dtype).requires_grad_()
        )

    def branch(position):
        down = matrix(rank, num_out if position == "post" else width)
        up = matrix(width if position == "pre" else num_out, rank)
        made = Branch(down, up, 1.7, activation, position, dropout)
        return made if gate is None else made._replace(gate=random(*gate))

    segments = [
        Segment(
            matrix(num_out, width),
            random(num_out) if bias else None,
            tuple(branch(position) for position in positions),
            random(num_out) if out_scale else None,
        )
        for _ in range(num_segments)
    ]
    options = {
        "prologue": prologue,
        "gain": random(width) if prologue == "rms_norm" else None,
        "in_scale": random(width) if in_scale else None,
        "residual": random(*lead, num_out) if residual else None,
        "seed": torch.tensor(0x0123456789ABCDEF),
    }
    x = tuple(random(*lead, width) for _ in range(2 if prologue == "swiglu" else 1))
    return Call(x, segments, options)


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)

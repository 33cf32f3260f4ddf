"""torchao's weight-only formats as the fused ops take them: a `torch.nn.Linear` whose weight is a tensor of torchao's.

Imported only where torchao already is. A layer with an int8 or float8 (e4m3) weight computes x W^T + b on the weight
that its own `dequantize` gives. One that quantises its activations as well, or scales them first, computes something
else and stays as it was, as do torchao's other formats.
"""

import functools

import torchao.quantization
from torch import Tensor, nn

from mmpeft_fast.layers.sites import LinearSite, Unfusable, register_weight
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.segments import Segment

_NAMES = {"Int8Tensor": "torchao int8", "Float8Tensor": "torchao float8"}
# Type of a weight -> the format's name in reports, of those that the release has. `qdata` and `scale` are what it lies
# in memory as.
FORMATS = {kind: name for attribute, name in _NAMES.items() if (kind := getattr(torchao.quantization, attribute, None))}
# What a weight carries where its layer does more to the activations than multiply them.
_ON_ACTIVATIONS = ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")


class TorchaoWeight(PackedWeight):
    """A weight [N, K] that torchao unpacks, multiplied in the dtype that it was quantised from."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.weight.shape, linear.weight.device, linear.weight.dtype)
        self.name, self._linear = FORMATS[type(linear.weight)], linear

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._linear.weight.qdata, self._linear.weight.scale

    def unpack(self, out: Tensor) -> None:
        out.copy_(self._linear.weight.dequantize())


def _read(linear: nn.Linear) -> LinearSite:
    weight = linear.weight
    found = [name for name in _ON_ACTIVATIONS if getattr(weight, name, None) is not None]
    if found:
        raise Unfusable(f"a {FORMATS[type(weight)]} weight has {found[0]}; expected a weight-only format")
    return LinearSite(Segment(TorchaoWeight(linear), linear.bias))


@functools.cache
def register() -> None:
    """Lets linear layers be read whose weights are torchao's."""
    for kind in FORMATS:
        register_weight(kind, _read)

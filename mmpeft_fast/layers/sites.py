"""Reading a module as the fused ops take it, whatever library put the PEFT parameters there.

`read_linear` and `read_gain` dispatch on the module's type; other libraries' layers are registered in `hf_peft`.
Reading happens at every call, so adapters switched or frozen at run time take effect at once.
"""

import functools
from typing import NamedTuple

from torch import Tensor, nn

from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.ops.segments import Segment


class LinearSite(NamedTuple):
    segment: Segment
    in_scale: Tensor | None = None


@functools.singledispatch
def read_linear(module: nn.Module) -> LinearSite:
    """Weight, bias, branches and scales of a linear site.

    Raises:
        ValueError: the module's type is not one that can be fused.
    """
    raise ValueError(
        f"fuse: cannot fuse a layer of type {type(module).__name__}; expected torch.nn.Linear or a PEFT layer"
    )


@read_linear.register
def _(module: nn.Linear) -> LinearSite:
    if type(module) is not nn.Linear:
        raise ValueError(f"fuse: cannot fuse a layer of type {type(module).__name__}; expected a plain torch.nn.Linear")
    return LinearSite(Segment(module.weight, module.bias))


@read_linear.register
def _(module: PeftLinear) -> LinearSite:
    return LinearSite(module.segment(), module.in_scale)


@functools.singledispatch
def read_norm(module: nn.Module) -> tuple[Tensor, float]:
    """Gain [K] and epsilon of an RMSNorm: with `variance_epsilon` (transformers), or a class `RMSNorm` with `eps`.

    Raises:
        ValueError: the module is something else.
    """
    if hasattr(module, "variance_epsilon"):
        return module.weight, module.variance_epsilon
    # The name is all that tells it from norms with `eps` and another formula (LayerNorm, Gemma's 1 + weight).
    if type(module).__name__ == "RMSNorm" and getattr(module, "eps", None) is not None:
        return module.weight, module.eps
    raise ValueError(f"cannot read a norm of type {type(module).__name__}; expected an RMSNorm")

"""Reading a module as the fused ops take it, whatever library put the PEFT parameters there.

`read_linear` and `read_norm` go by the module's exact type; other libraries' layers are registered in `hf_peft`.
Reading happens at every call, so adapters switched or frozen at run time take effect at once.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmpeft_fast.layers.class_swap import own_class
from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.ops.segments import Segment


class Unfusable(ValueError):
    """A module computes something that the fused code would not reproduce; the text says what."""


class LinearSite(NamedTuple):
    segment: Segment
    in_scale: Tensor | None = None


class NormSite(NamedTuple):
    gain: Tensor
    eps: float


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its elements in memory, and no sharded, quantised or otherwise wrapped one."""
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor)


def check_forward(module: nn.Module) -> None:
    """Raises Unfusable where a module's forward is not that of its class (offloading and dispatching replace it)."""
    if "forward" in module.__dict__:
        raise Unfusable(f"the forward of a {type(module).__name__} was replaced; fuse before that")


def check_untouched(*modules: nn.Module) -> None:
    """Raises Unfusable where calling one of the modules would do more than its class says: the fused code reads these
    modules and calls none of them."""
    for module in modules:
        check_forward(module)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise Unfusable(f"a {type(module).__name__} carries hooks, which fused code would not run")


def read_linear(module: nn.Module) -> LinearSite:
    """Weight, bias, branches and scales of a linear site.

    Raises:
        Unfusable: the module's type is not one that can be fused, or somebody has put hooks on it.
    """
    reader = _LINEAR_READERS.get(type(module))
    if reader is None:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise Unfusable(f"a layer of type {kind} cannot be read; expected torch.nn.Linear or a PEFT layer on one")
    check_untouched(module)
    return reader(module)


def _check_weight(module: nn.Linear) -> None:
    if not is_plain(module.weight):
        raise Unfusable(f"a weight is a {type(module.weight).__name__}; expected a plain tensor (fuse before sharding)")


def _read_plain_linear(module: nn.Linear) -> LinearSite:
    _check_weight(module)
    return LinearSite(Segment(module.weight, module.bias))


def read_peft_linear(module: PeftLinear) -> LinearSite:
    """The reader of a PeftLinear, or of a subclass with the same definition."""
    _check_weight(module)
    check_untouched(*module.branches)
    return LinearSite(module.segment(), module.in_scale)


_LINEAR_READERS: dict[type, Callable[[nn.Module], LinearSite]] = {
    nn.Linear: _read_plain_linear,
    PeftLinear: read_peft_linear,
}
_NORM_READERS: dict[type, Callable[[nn.Module], NormSite]] = {}


def register_linear(kind: type, reader: Callable[[nn.Module], LinearSite]) -> None:
    """Makes modules of exactly this type linear sites."""
    _LINEAR_READERS[kind] = reader


def register_norm(kind: type, reader: Callable[[nn.Module], NormSite]) -> None:
    """Makes modules of exactly this type norms."""
    _NORM_READERS[kind] = reader


def read_norm(module: nn.Module) -> NormSite:
    """Gain [K] and epsilon of an RMSNorm: with `variance_epsilon` (transformers), or a class `RMSNorm` with `eps`.

    Raises:
        Unfusable: the module is something else.
    """
    reader = _NORM_READERS.get(own_class(module))
    if reader is not None:
        return reader(module)
    if hasattr(module, "variance_epsilon"):
        return NormSite(module.weight, module.variance_epsilon)
    # The name is all that tells it from norms with `eps` and another formula (LayerNorm, Gemma's 1 + weight).
    if type(module).__name__ == "RMSNorm" and getattr(module, "eps", None) is not None:
        return NormSite(module.weight, module.eps)
    raise Unfusable(f"a norm of type {type(module).__name__} cannot be read; expected an RMSNorm")

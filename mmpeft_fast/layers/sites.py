"""Reading a module as the fused ops take it, whatever library put the PEFT parameters there.

Fused code reads these modules and calls none of them, so reading is also the test: a module is read only if calling it
would do what is known (`layers.known`) and nothing more. `read_linear` and `read_norm` go by the module's exact type;
other libraries' layers are registered in `hf_peft`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from transformers.utils import output_capturing

from mmpeft_fast.layers.class_swap import own_class
from mmpeft_fast.layers.known import is_shipped, why_unknown
from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.segments import Segment


class Unfusable(ValueError):
    """A module computes something that the fused code would not reproduce; the text says what."""

    def __str__(self) -> str:  # in Python, so that a compiler can trace it
        return self.args[0]


class LinearSite(NamedTuple):
    segment: Segment
    in_scale: Tensor | None = None

    @property
    def is_found(self) -> bool:
        """Whether all its tensors are the modules' own, the same at every call, and none was computed from them."""
        branches = (tensor for branch in self.segment.branches for tensor in (branch.down, branch.up, branch.gate))
        tensors = (self.segment.weight, self.segment.bias, self.segment.out_scale, self.in_scale, *branches)
        return all(tensor is None or isinstance(tensor, nn.Parameter | PackedWeight) for tensor in tensors)


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


def check_bypassed(module: nn.Module, role: str) -> None:
    """Raises Unfusable unless calling the module would do what is known as `role`, and nothing more: fused code does
    not call it."""
    check_forward(module)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        others = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(others) or not all(map(recorded_key, module._forward_hooks.values())):
            raise Unfusable(f"a {type(module).__name__} carries hooks, which fused code would not run")
    reason = why_unknown(own_class(module), role)
    if reason is not None:
        raise Unfusable(reason)


def may_compute(hook: Callable) -> bool:
    """Whether a hook may change or see what a module computes: FSDP's gather shards, transformers' collect what a call
    asks for, this package's are known."""
    home = str(getattr(hook, "__module__", None))
    return not home.startswith(("torch.distributed.", "mmpeft_fast.")) and recorded_key(hook) is None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module runs hooks that `may_compute`."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(may_compute(hook) for hooks in kinds for hook in hooks.values())


def why_not_as_known(module: nn.Module, role: str) -> str | None:
    """Why calling the module may do something else than what is known as `role`, or None."""
    if "forward" in module.__dict__:
        return f"the forward of a {type(module).__name__} was replaced"
    if has_hooks(module):
        return f"a {type(module).__name__} carries hooks"
    return why_unknown(own_class(module), role)


@torch.compiler.assume_constant_result  # a compiler that has seen a closure's cell cannot run the closure
def recorded_key(hook: Callable) -> str | None:
    """What a forward hook of transformers records where that is asked for ("attentions", ...); None for any other.

    transformers leaves these hooks on a model after the first call that asks for hidden states.
    """
    if not is_shipped(hook, output_capturing.__name__) or "key" not in hook.__code__.co_freevars:
        return None
    return hook.__closure__[hook.__code__.co_freevars.index("key")].cell_contents


def is_recorded(keys: set[str]) -> bool:
    """Whether transformers is recording one of these keys at this moment."""
    recording = output_capturing._active_collector.get() if keys else None
    return recording is not None and not keys.isdisjoint(recording)


# Hooks on every module: dicts of torch, empty unless somebody registered one.
GLOBAL_HOOKS = tuple(
    getattr(torch_module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)


def check_no_global_hooks() -> None:
    """Raises Unfusable where a hook on every module is registered that may change results: modules that are not called
    would not run it. torch's own trackers, which count FLOPs by module, only look."""
    for hooks in GLOBAL_HOOKS:
        for hook in hooks.values():
            if getattr(hook, "__module__", None) != "torch.utils.module_tracker":
                raise Unfusable("a hook on every module is registered, which fused code would not run")


def read_linear(module: nn.Module) -> LinearSite:
    """Weight, bias, branches and scales of a linear site.

    Raises:
        Unfusable: the module's type is not one that can be fused, somebody has put hooks on it or changed its class.
    """
    known = _LINEAR_READERS.get(type(module))
    if known is None:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise Unfusable(f"a layer of type {kind} cannot be read; expected torch.nn.Linear or a PEFT layer on one")
    reader, role = known
    check_bypassed(module, role)
    return reader(module)


def _read_plain_linear(module: nn.Linear) -> LinearSite:
    if type(module.weight) in _WEIGHT_READERS:
        return _WEIGHT_READERS[type(module.weight)](module)
    if not is_plain(module.weight):
        raise Unfusable(f"a weight is a {type(module.weight).__name__}; expected a plain tensor (fuse before sharding)")
    return LinearSite(Segment(module.weight, module.bias))


def read_peft_linear(module: PeftLinear) -> LinearSite:
    """The reader of a PeftLinear, or of a subclass with the same definition."""
    reader, role = _LINEAR_READERS[module.plain]
    reason = why_unknown(module.plain, role)
    if reason is not None:
        raise Unfusable(reason)
    for branch in module.branches:
        check_bypassed(branch, "bottleneck")
    return LinearSite(module.on(reader(module).segment), module.in_scale)


def is_packed_tensor(tensor: Tensor) -> bool:
    """Whether a tensor holds elements in a format that is unpacked to be multiplied, whatever dtype it says it has."""
    return type(tensor) in _WEIGHT_READERS or not tensor.is_floating_point()


def _may_be_packed(linear: nn.Linear) -> bool:
    """Whether reading a layer could give packed weights; a plain one may be in any state."""
    kind = type(linear)
    return kind in _LINEAR_READERS and (kind is not nn.Linear or type(linear.weight) in _WEIGHT_READERS)


def packed_weights(module: nn.Module) -> dict[nn.Linear, PackedWeight]:
    """The linear layers below a module whose weights are packed, without what is around them or on them.

    Raises:
        Unfusable: one of them cannot be read.
    """
    found = {}
    for inner in module.modules():
        if isinstance(inner, nn.Linear) and _may_be_packed(inner):
            weight = read_linear(inner).segment.weight
            if isinstance(weight, PackedWeight):
                found[inner] = weight
    return found


def read_dropout(module: nn.Module) -> float:
    """The probability with which a dropout module drops at this moment.

    Raises:
        Unfusable: neither torch's Dropout nor Identity.
    """
    check_bypassed(module, "dropout")
    if type(module) is nn.Identity:
        return 0.0
    if type(module) is not nn.Dropout:
        raise Unfusable(f"a dropout is a {type(module).__name__}; expected torch.nn.Dropout")
    return module.p if module.training else 0.0


_LINEAR_READERS: dict[type, tuple[Callable[[nn.Module], LinearSite], str]] = {
    nn.Linear: (_read_plain_linear, "linear"),
    PeftLinear: (read_peft_linear, "peft_linear"),
}
# By the type of the weight of a plain linear layer, where a format is a tensor's and not a layer's.
_WEIGHT_READERS: dict[type, Callable[[nn.Module], LinearSite]] = {}
_NORM_READERS: dict[type, tuple[Callable[[nn.Module], NormSite], str]] = {}


def register_linear(kind: type, reader: Callable[[nn.Module], LinearSite], role: str) -> None:
    """Makes modules of exactly this type linear sites; role: what the type's forward is known as."""
    _LINEAR_READERS[kind] = reader, role


def register_weight(kind: type, reader: Callable[[nn.Module], LinearSite]) -> None:
    """Makes plain linear layers whose weights are of exactly this type linear sites."""
    _WEIGHT_READERS[kind] = reader


def register_norm(kind: type, reader: Callable[[nn.Module], NormSite], role: str) -> None:
    """Makes modules of exactly this type norms; role: what the type's forward is known as."""
    _NORM_READERS[kind] = reader, role


def read_norm(module: nn.Module, *, is_called: bool = False) -> NormSite:
    """Gain [K] and epsilon of an RMSNorm.

    is_called: the module itself is called, so that hooks on it run; whatever it is made of is read all the same.

    Raises:
        Unfusable: the module is something else.
    """
    kind = own_class(module)
    reader, role = _NORM_READERS.get(kind, (read_rms_norm, "rms_norm"))
    if is_called:
        reason = why_unknown(kind, role)
        if reason is not None:
            raise Unfusable(reason)
    else:
        check_bypassed(module, role)
    return reader(module)


def read_rms_norm(module: nn.Module) -> NormSite:
    """Gain and epsilon under the names that RMSNorms of transformers have for them."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float):
        raise Unfusable(f"a norm of type {type(module).__name__} has no epsilon that can be read")
    return NormSite(module.weight, eps)

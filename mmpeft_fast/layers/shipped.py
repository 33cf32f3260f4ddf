"""Whether what would run is what a library has shipped: the function object, not its name."""

import functools
import os
import sys
from collections.abc import Callable

from torch import nn

from mmpeft_fast.layers.class_swap import Swapped, unswapped

# Hooks of these modules compute nothing: they gather shards, or collect outputs for a call that has asked for them.
_INERT_HOOKS = ("torch.distributed.", "transformers.utils.output_capturing", "mmpeft_fast.")


@functools.cache
def is_shipped(function: Callable, module: str, qualname: str) -> bool:
    """Whether `function` is what the source of `module` defines under `qualname`, and whatever wraps it is of the same
    library."""
    library = os.path.dirname(sys.modules[module.partition(".")[0]].__file__) + os.sep
    while True:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(library):
            return False
        if not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    return code.co_filename == sys.modules[module].__file__ and function.__qualname__ == qualname


def forward_owner(kind: type) -> type:
    """The class whose forward a module runs beneath every `swap_class`."""
    return next(base for base in kind.__mro__ if "forward" in base.__dict__ and not issubclass(base, Swapped))


def why_not_shipped(kind: type) -> str | None:
    """Why a module of this class runs another forward than a library's own, or None."""
    owner, own = forward_owner(kind), unswapped(kind)
    # A publisher's model runs a class of this package, which its own is no subclass of.
    if own is not owner and issubclass(own, owner):
        return f"{own.__name__} is a subclass of {owner.__name__}, which may compute anything"
    module = owner.__module__
    if module.partition(".")[0] not in ("torch", "transformers", "peft", "mmpeft_fast"):
        return f"{module}.{owner.__qualname__} is no class of a library that is known"
    if not is_shipped(owner.forward, module, f"{owner.__qualname__}.forward"):
        return f"the forward of {owner.__name__} was replaced"
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would run hooks that may compute something."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not _is_inert(hook) for hooks in kinds for hook in hooks.values())


def _is_inert(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_INERT_HOOKS)


def runs_as_shipped(module: nn.Module) -> bool:
    """Whether calling the module runs a library's forward and nothing else."""
    return "forward" not in module.__dict__ and not has_hooks(module) and why_not_shipped(type(module)) is None

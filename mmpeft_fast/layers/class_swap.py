"""Changing what a module computes without touching its parameters, names or place in the tree.

`swap_class(module, Mixin)` gives one instance a subclass of its own class with `Mixin` in front; everything the module
holds stays as it is, so state dicts, hooks, `deepcopy` and isinstance checks keep working. `restore_class` undoes it.
"""

import functools

from torch import nn


@functools.cache
def subclass(mixin: type, base: type) -> type:
    """The class `base` with `mixin` in front; the same one for the same pair."""

    def forward(self, *args, **kwargs):
        return mixin.forward(self, *args, **kwargs)

    # The signature stays visible: trainers and `generate` inspect it. The class keeps its name because
    # `save_pretrained` writes it into the configuration.
    functools.update_wrapper(forward, base.forward)
    namespace = {"forward": forward, "_swapped_from": base, "__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), namespace)


class Swapped:
    """Base of the mixins that `swap_class` puts in front of a module's class."""

    def _get_name(self):
        return f"Fused{type(self).__name__}"


def swap_class(module: nn.Module, mixin: type) -> None:
    """Puts `mixin` in front of the class of this one instance; a module that has it already is left alone."""
    if not isinstance(module, mixin):
        module.__class__ = subclass(mixin, type(module))


def is_swapped(module: nn.Module) -> bool:
    return isinstance(module, Swapped)


def own_class(module: nn.Module) -> type:
    """The class that a module has without any `swap_class`."""
    kind = type(module)
    while issubclass(kind, Swapped):
        kind = kind._swapped_from
    return kind


def restore_class(module: nn.Module) -> None:
    """Undoes every `swap_class` on this instance; anything else is left alone."""
    if is_swapped(module):
        module.__class__ = own_class(module)

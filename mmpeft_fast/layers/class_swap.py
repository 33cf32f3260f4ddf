"""Changing what a module computes without touching its parameters, names or place in the tree.

`swap_class(module, Mixin)` gives one instance a subclass of its own class with `Mixin` in front; everything the module
holds stays as it is, so state dicts, hooks, `deepcopy` and isinstance checks keep working. `restore_class` undoes it.
"""

import functools
from collections.abc import Callable

from torch import nn


class Derived:
    """Base of the mixins that `subclass` puts in front of a class: instances are pickled and copied by what their class
    was made of, because no module has that class under its name."""

    _maker: tuple[Callable[..., type], tuple[type, ...]]

    def __reduce_ex__(self, protocol):
        reduced = super().__reduce_ex__(protocol)
        if "_maker" not in type(self).__dict__:  # somebody has derived a class further
            return reduced
        return (_blank, (_recipe(type(self)),), *reduced[2:])


class Swapped(Derived):
    """Base of the mixins that `swap_class` puts in front of a module's class.

    Only an instance is swapped: calling the class makes an instance of the class beneath, so that
    `type(model).from_pretrained` and `type(model)(config)` give what they gave before.
    """

    def __new__(cls, *args, **kwargs):
        return unswapped(cls)(*args, **kwargs)

    def _get_name(self):
        return f"Fused{type(self).__name__}"


def _recipe(kind: type):
    """A class as a pickle can hold it: itself, or its maker and the recipes of what that takes."""
    if "_maker" not in kind.__dict__:
        return kind
    make, parts = kind._maker
    return make, tuple(map(_recipe, parts))


def _cook(recipe) -> type:
    if isinstance(recipe, type):
        return recipe
    make, parts = recipe
    return make(*map(_cook, parts))


def _blank(recipe) -> nn.Module:
    """An instance without state of the class that a recipe gives, as unpickling and `copy` want it."""
    return object.__new__(_cook(recipe))


@functools.cache
def subclass(mixin: type, base: type) -> type:
    """The class `base` with `mixin` in front; the same one for the same pair."""

    def forward(self, *args, **kwargs):
        if not isinstance(self, mixin):  # a bound method that somebody took, and the module was restored since
            return base.forward(self, *args, **kwargs)
        return mixin.forward(self, *args, **kwargs)

    # The signature stays visible: trainers and `generate` inspect it. The class keeps its name because
    # `save_pretrained` writes it into the configuration.
    functools.update_wrapper(forward, base.forward)
    namespace = {
        "forward": forward,
        "_swapped_from": base,
        "_maker": (subclass, (mixin, base)),
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (mixin, base), namespace)


def swap_class(module: nn.Module, mixin: type) -> None:
    """Puts `mixin` in front of the class of this one instance; a module that has it already is left alone."""
    if not isinstance(module, mixin):
        module.__class__ = subclass(mixin, type(module))


def is_swapped(module: nn.Module) -> bool:
    return isinstance(module, Swapped)


def unswapped(kind: type) -> type:
    """The class beneath every `swap_class`."""
    while issubclass(kind, Swapped):
        kind = kind._swapped_from
    return kind


def own_class(module: nn.Module) -> type:
    """The class that a module has without any `swap_class`."""
    return unswapped(type(module))


def check_restorable(module: nn.Module) -> None:
    """Raises ValueError where somebody has derived a class from the swapped one: nothing says what it would be without
    what it was derived from."""
    if is_swapped(module) and "_swapped_from" not in type(module).__dict__:
        raise ValueError(
            f"unfuse: a {own_class(module).__name__} has class {type(module).__qualname__}, which was derived after "
            "fuse; expected the class that fuse gave it (put that back first)"
        )


def restore_class(module: nn.Module) -> None:
    """Undoes every `swap_class` on this instance; anything else is left alone.

    Raises:
        ValueError: see `check_restorable`.
    """
    check_restorable(module)
    if is_swapped(module):
        module.__class__ = own_class(module)

"""The methods. A new method is one file and one line in `METHODS`, or outside of this package one call of
`register_method`."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from mmpeft_fast.methods.adapter import Adapter
from mmpeft_fast.methods.dora import DoRA
from mmpeft_fast.methods.ia3 import IA3
from mmpeft_fast.methods.layernorm import LayerNorm
from mmpeft_fast.methods.lora import LoRA
from mmpeft_fast.methods.lorafa import LoRAFA
from mmpeft_fast.methods.method import Method
from mmpeft_fast.methods.moelora import MOELoRA
from mmpeft_fast.methods.msplora import MSPLoRA
from mmpeft_fast.methods.prefix import Prefix
from mmpeft_fast.methods.sharelora import ShareLoRA
from mmpeft_fast.methods.vera import VeRA

METHODS: dict[str, Callable[..., Method]] = {
    "lora": LoRA,
    "ia3": IA3,
    "adapter": Adapter,
    "prefix": Prefix,
    "layernorm": partial(LayerNorm, connector=True, embeddings=True, head=True),
    "layernorm-simp": LayerNorm,
    "sharelora": ShareLoRA,
    "msplora": MSPLoRA,
    "dora": DoRA,
    "lora-fa": LoRAFA,
    "vera": VeRA,
    "moelora": MOELoRA,
}

__all__ = [
    "IA3",
    "METHODS",
    "Adapter",
    "DoRA",
    "LayerNorm",
    "LoRA",
    "LoRAFA",
    "MOELoRA",
    "MSPLoRA",
    "Method",
    "Prefix",
    "ShareLoRA",
    "VeRA",
    "make_method",
    "method_class",
    "register_method",
]


def register_method(name: str, build: Callable[..., Method]) -> None:
    """Makes a method known by name to the command line, the planner, the study and `load_peft`.

    Args:
        name: such as "parallel-mlp".
        build: a frozen dataclass that derives from `Method`, or a `functools.partial` of one.

    Raises:
        ValueError: the name, or the class's, is another method's already.
        TypeError: no such class.
    """
    kind = _class_of(build)
    if not (isinstance(kind, type) and issubclass(kind, Method) and is_dataclass(kind)):
        raise TypeError(f"register_method: expected a dataclass that derives from Method, got {build!r}")
    others = {_class_of(other) for known, other in METHODS.items() if known != name} - {kind}
    if name in METHODS and _class_of(METHODS[name]).__qualname__ != kind.__qualname__:
        raise ValueError(f"register_method: {name!r} is a {_class_of(METHODS[name]).__name__} already")
    if any(other.__name__ == kind.__name__ for other in others):
        raise ValueError(f"register_method: there is another method of class {kind.__name__} already")
    METHODS[name] = build


def method_class(name: str) -> type[Method]:
    """The class of a known method by the class's name. Raises ValueError where there is none."""
    for build in METHODS.values():
        if _class_of(build).__name__ == name:
            return _class_of(build)
    known = sorted({_class_of(build).__name__ for build in METHODS.values()})
    raise ValueError(f"expected a method among {known}, got {name!r}; register_method makes another one known")


def _class_of(build: Callable[..., Method]) -> Any:
    return build.func if isinstance(build, partial) else build


def make_method(name: str, **overrides) -> Method:
    """A method by name with some settings changed.

    Raises:
        ValueError: unknown method, setting or value.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {sorted(METHODS)}")
    build = METHODS[name]
    common = {field.name for field in fields(Method)}
    known = sorted((field.name for field in fields(_class_of(build))), key=common.__contains__)  # its own come first
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"method {name!r} has no setting {unknown}; expected settings in {known}")
    return build(**overrides)

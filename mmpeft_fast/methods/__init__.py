"""The methods of the study. A new method is one file and one line in `METHODS`."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from mmpeft_fast.methods.adapter import Adapter
from mmpeft_fast.methods.ia3 import IA3
from mmpeft_fast.methods.layernorm import LayerNorm
from mmpeft_fast.methods.lora import LoRA
from mmpeft_fast.methods.method import Method
from mmpeft_fast.methods.prefix import Prefix

METHODS: dict[str, Callable[..., Method]] = {
    "lora": LoRA,
    "ia3": IA3,
    "adapter": Adapter,
    "prefix": Prefix,
    "layernorm": partial(LayerNorm, connector=True, embeddings=True, head=True),
    "layernorm-simp": LayerNorm,
}

__all__ = ["IA3", "METHODS", "Adapter", "LayerNorm", "LoRA", "Method", "Prefix", "make_method"]


def make_method(name: str, **overrides) -> Method:
    """A method by name with some settings changed.

    Raises:
        ValueError: unknown method, setting or value.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {sorted(METHODS)}")
    build = METHODS[name]
    known = [field.name for field in fields(build.func if isinstance(build, partial) else build)]
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"method {name!r} has no setting {unknown}; expected settings in {known}")
    return build(**overrides)

"""Settings checked against their own annotations: the type, and what `Annotated` adds to it.

    r: Annotated[int, at_least(1)]
    dropout: Annotated[float, at_least(0), below(1)]
    init: Annotated[str, one_of("bert", "kaiming")]

A class calls `check_fields(self)` where it is made, so that a new field cannot be forgotten.
"""

import dataclasses
import functools
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

_INT64 = range(-(2**63), 2**63)


class Bound(NamedTuple):
    """A condition on a value, and the words for it behind "a number" or "an integer"; `alone` where they say it all."""

    words: str
    holds: Callable[[Any], bool]
    alone: bool = False


def at_least(limit: float) -> Bound:
    return Bound(f"of at least {limit}", lambda value: operator.ge(value, limit))


def above(limit: float) -> Bound:
    return Bound(f"above {limit}", lambda value: operator.gt(value, limit))


def at_most(limit: float) -> Bound:
    return Bound(f"of at most {limit}", lambda value: operator.le(value, limit))


def between(low: float, high: float) -> Bound:
    return Bound(f"of {low} to {high}", lambda value: low <= value <= high)


def below(limit: float) -> Bound:
    return Bound(f"below {limit}", lambda value: operator.lt(value, limit))


def one_of(*names: str) -> Bound:
    return Bound(f"one of {list(names)}", lambda value: value in names, alone=True)


def check_fields(settings: object, owner: str = "") -> None:
    """Compares every field of a dataclass with its annotation.

    Args:
        settings: a dataclass instance.
        owner: what the sentence puts before a field's name, such as "LoRA.".

    Raises:
        ValueError: the first value of another type or out of range. An int is a float, a bool is neither; numbers are
            finite, and integers have 64 bits.
    """
    for name, hint in _hints(type(settings)).items():
        check_value(f"{owner}{name}", getattr(settings, name), hint)


def check_value(name: str, value: object, hint: object) -> None:
    """The same for one value. hint: of int, float, bool, str, None, Path, Literal, tuples, lists, sets, dicts and
    unions of them, `Annotated` or not."""
    if not _fits(value, hint):
        raise ValueError(f"{name}: expected {_words(hint)}, got {shown(value)}")


def shown(value: object) -> str:
    """A value for an error message, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, a list in a list in a list ..
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 120 else f"{text[:120]}.."


@functools.cache
def _hints(kind: type) -> dict[str, object]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.name[0] != "_"}


def _fits(value: object, hint: object) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _fits(value, arguments[0]) and all(bound.holds(value) for bound in arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and value in _INT64
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max  # false for nan too
    kind = origin or hint
    if kind in (tuple, list):  # JSON has lists, Python's literals are tuples
        item = arguments[0] if arguments else object
        return isinstance(value, tuple | list) and all(_fits(each, item) for each in value)
    if kind is set:
        item = arguments[0] if arguments else object
        return isinstance(value, set | frozenset | list | tuple) and all(_fits(each, item) for each in value)
    if kind in (dict, Mapping):
        key, item = arguments or (object, object)
        return isinstance(value, Mapping) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    return kind is Any or isinstance(value, kind)


def _words(hint: object) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = arguments[1:]
        if any(bound.alone for bound in bounds):
            return next(bound.words for bound in bounds if bound.alone)
        return f"{_words(arguments[0])} {' and '.join(bound.words for bound in bounds)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(member) for member in arguments))
    if origin is typing.Literal:
        return " or ".join(repr(allowed) for allowed in arguments)
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "a text", Path: "a path"}
    if hint in plain:
        return plain[hint]
    if hint in (None, type(None)):
        return "none"
    kind = origin or hint
    if kind in (tuple, list, set):
        return f"a list of {_plural(arguments[0])}" if arguments else "a list"
    if kind in (dict, Mapping):
        return "an object"
    return f"a {getattr(kind, '__name__', kind)}"


def _plural(hint: object) -> str:
    return {str: "texts", int: "integers", float: "numbers"}.get(hint, "values")

"""Which forward functions compute what the fused code computes: told by what they say, not by their names.

Fused code bypasses the `forward` of a decoder layer, its attention, MLP, norms, linear and tuner layers. That is right
only for the very computation that a library ships. `known.json` lists it by kind ("attention", "rms_norm", ...): the
digest of a function is that of its syntax tree, without annotations, docstrings and decorators, and of the library
functions that it calls by global name. Whatever is patched, subclassed or changed by a release has another digest, is
unknown, and runs as it is. So does what calls a function of a library's module, or a tensor's method, that somebody
has replaced or wrapped (`nn.functional.scaled_dot_product_attention`).

`python -m mmpeft_fast.shipped` writes the table from the libraries that are installed, for every family.
"""

import ast
import contextlib
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from types import FunctionType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmpeft_fast.layers.snapshot import Lookup

TABLE = "known.json"
# Packages whose decorators (functools.wraps) may stand around a forward: they do not change what it computes.
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "mmpeft_fast")
# Whose functions are read too where a library's function calls them; torch's are taken as they are.
_READ_INTO = ("transformers", "mmpeft_fast")
# What flash attention's functions of transformers hold and call, under whatever name it was loaded.
_KERNELS = ("flash_attn", "kernels")
# What calling a module does besides its forward; a class that changes one of them may do anything.
_SPECIAL = ("__call__", "__getattr__", "__getattribute__")
# These modules are called, so that what stands around their forward runs: as it may for a layer, whereas a head must
# still work row by row.
_SPECIAL_OF_CALLED = {"decoder_layer": (), "head": ("__call__",)}
# Operators that libraries' functions and this package's own apply to tensors.
_OPERATORS = (
    "__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__",
    "__truediv__", "__rtruediv__", "__itruediv__", "__matmul__", "__neg__", "__pow__", "__getitem__", "__setitem__",
)  # fmt: skip


class _Unknown(ValueError):
    """A function that has no digest; the text says why. lookups: what that rests on, as far as it was read."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.lookups: list[Lookup] = []


class Identity(NamedTuple):
    """A function's digest, and the global names that it rests on."""

    digest: str
    lookups: tuple[Lookup, ...]


class Verdict(NamedTuple):
    """reason: why a class is unknown, or None; lookups: what has to stay as it is for that to hold."""

    reason: str | None
    lookups: tuple[Lookup, ...]


class _Plain(ast.NodeTransformer):
    """A syntax tree without what does not change the result."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.decorator_list, node.returns, node.type_comment = [], None, None
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_arg(self, node):
        node.annotation = None
        return node

    def visit_AnnAssign(self, node):
        self.generic_visit(node)
        return ast.Assign([node.target], node.value) if node.value is not None else None


def _innermost(function: object) -> FunctionType:
    """The function inside a library's decorators."""
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        if package_of(function) not in _LIBRARIES:
            raise _Unknown(f"{function.__qualname__} is wrapped by {function.__globals__.get('__name__')}")
        function = function.__wrapped__
    if not isinstance(function, FunctionType):
        raise _Unknown(f"{getattr(function, '__qualname__', function)!s} is no Python function")
    return function


def _tree_of(function: FunctionType) -> ast.FunctionDef:
    name = function.__qualname__
    try:
        nodes = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError):
        raise _Unknown(f"the source of {name} cannot be read") from None
    if len(nodes) != 1 or not isinstance(nodes[0], ast.FunctionDef) or nodes[0].name != function.__code__.co_name:
        raise _Unknown(f"the source of {name} is no function of that name")
    return _Plain().visit(nodes[0])


def _said(node: object) -> str:
    """A syntax tree in words that no version of Python changes: `ast.dump` has other fields in each."""
    if isinstance(node, list):
        return "[" + " ".join(map(_said, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = ((name, value) for name, value in ast.iter_fields(node) if name != "ctx" and value not in (None, []))
    inner = " ".join(f"{name}={_said(value)}" for name, value in fields)
    return f"{type(node).__name__}({inner})"


def _identify(function: object, seen: tuple[FunctionType, ...] = ()) -> Identity:
    function = _innermost(function)
    if any(name != "__class__" for name in function.__code__.co_freevars):
        raise _Unknown(f"{function.__qualname__} is a closure")
    tree, namespace = _tree_of(function), function.__globals__
    said, lookups = [_said(tree), repr(function.__defaults__), repr(function.__kwdefaults__)], []
    try:
        _say_names(tree, namespace, (*seen, function), said, lookups)
    except _Unknown as reason:
        reason.lookups[:0] = lookups
        raise
    return Identity(hashlib.sha256("\n".join(said).encode()).hexdigest()[:16], tuple(lookups))


def _say_names(tree, namespace, seen, said, lookups) -> None:
    """What the global names in a function's tree stand for: to `said`, and to `lookups` that they do."""
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & namespace.keys()):
        value = namespace[name]
        lookups.append(Lookup(namespace, name, value))
        if isinstance(value, FunctionType) and value not in seen:
            inner = _identify(value, seen)
            said.append(f"{name} {inner.digest}")
            lookups += inner.lookups
        elif isinstance(value, ModuleType):
            said.append(f"{name} {value.__name__}")
        elif isinstance(value, type):
            said.append(f"{name} {value.__module__}.{value.__qualname__}")
        elif isinstance(value, (bool, int, float, str, tuple, list, type(None))):
            said.append(f"{name} {value!r}")
        else:
            said.append(f"{name} a {type(value).__name__}")
    _check_members(tree, namespace, lookups)


def _check_members(tree: ast.AST, namespace: dict, lookups: list[Lookup]) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _check_member(node, namespace, lookups)
    for name in _OPERATORS:
        _check_method(name, lookups)


def _check_method(name: str, lookups: list[Lookup]) -> None:
    """Raises where a tensor's method of that name, if there is one, is of no library."""
    method = getattr(Tensor, name, None)
    if callable(method):
        lookups.append(Lookup(Tensor, name, method))
        if not _is_of_library(method):
            raise _Unknown(f"torch.Tensor.{name} was replaced")


def _check_member(node: ast.Attribute, namespace: dict, lookups: list[Lookup]) -> None:
    """Raises where `node` is a member of a library's module, or has the name of a tensor's method, that is of no
    library."""
    path = [node.attr]
    _check_method(node.attr, lookups)
    while isinstance(node.value, ast.Attribute):
        node = node.value
        path.insert(0, node.attr)
    owner = namespace.get(node.value.id) if isinstance(node.value, ast.Name) else None
    for name in path:
        if not isinstance(owner, ModuleType) or not _is_of_library(owner) or not hasattr(owner, name):
            return
        value = getattr(owner, name)
        if callable(value):
            lookups.append(Lookup(owner, name, value))
            if not _is_of_library(value):
                raise _Unknown(f"{owner.__name__}.{name} was replaced")
        owner = value


def package_of(value: object) -> str:
    """The package whose code a module, function, class or callable object is, whatever it says of itself."""
    while hasattr(value, "__func__"):
        value = value.__func__
    if isinstance(value, FunctionType):
        module = value.__globals__.get("__name__")
    elif isinstance(value, ModuleType):
        module = value.__name__
    else:
        module = (value if isinstance(value, type) else type(value)).__module__
    return str(module).partition(".")[0]


def _is_of_library(value: object) -> bool:
    while isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
        if package_of(value) not in (*_LIBRARIES, "contextlib"):
            return False
        value = value.__wrapped__
    return package_of(value) in (*_LIBRARIES, "builtins")


_identities: dict[FunctionType, Identity] = {}


def identify(function: object) -> Identity:
    """The digest of a function, computed once as long as nothing that it rests on is replaced.

    Raises:
        ValueError: it has none: no source, a closure, or wrapped by something that is no library's.
    """
    found = _identities.get(function) if isinstance(function, FunctionType) else None
    if found is None or not all(lookup.holds() for lookup in found.lookups):
        found = _identities[function] = _identify(function)
    return found


def _read_table() -> dict[str, dict[str, list[str]]]:
    return json.loads(resources.files("mmpeft_fast.layers").joinpath(TABLE).read_text())


_table: Mapping[str, Mapping[str, list[str]]] | None = None
_learnt: dict[tuple[str, str], set[str]] | None = None


@contextlib.contextmanager
def learning() -> Iterator[dict[tuple[str, str], set[str]]]:
    """Inside, every class is known and noted: (kind, digest) -> classes that have it."""
    global _learnt
    _learnt = {}
    _verdicts.clear()
    try:
        yield _learnt
    finally:
        _learnt = None
        _verdicts.clear()


def table() -> Mapping[str, Mapping[str, list[str]]]:
    """kind -> digest -> the classes and library versions that have it."""
    global _table
    if _table is None:
        _table = _read_table()
    return _table


_verdicts: dict[tuple[object, str], Verdict] = {}
_accepted: dict[tuple[type, str], object] = {}


def accept(kind: type, role: str) -> None:
    """Takes a class as known for `role`, as its forward stands: its family answers for it."""
    _accepted.setdefault((kind, role), kind.forward)


def judge_class(kind: type, role: str) -> Verdict:
    """Whether calling a module of this class computes what the table lists for `role`."""
    found = _verdicts.get((kind, role))
    if found is None or not all(lookup.holds() for lookup in found.lookups):
        found = _verdicts[kind, role] = _judge_class(kind, role)
    return found


def _judge_class(kind: type, role: str) -> Verdict:
    lookups = [Lookup(kind, "forward", kind.forward)]
    named = f"{kind.__module__}.{kind.__qualname__}"
    for special in _SPECIAL_OF_CALLED.get(role, _SPECIAL):
        lookups.append(Lookup(kind, special, getattr(kind, special, None)))
        if lookups[-1].found is not getattr(nn.Module, special, None):
            return Verdict(f"{named} has a {special} of its own", tuple(lookups))
    if _accepted.get((kind, role)) is kind.forward:
        return Verdict(None, tuple(lookups))
    if is_own(kind.forward):
        verdict = judge_calls(kind.forward)
    else:
        verdict = _judge(kind.forward, role, f"the forward of {named}", named)
    return verdict._replace(lookups=(*lookups, *verdict.lookups))


def judge_function(function: object, role: str) -> Verdict:
    """Whether calling a function computes what the table lists for `role`."""
    found = _verdicts.get((function, role)) if isinstance(function, FunctionType) else None
    if found is None or not all(lookup.holds() for lookup in found.lookups):
        named = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}"
        found = _judge(function, role, named, named)
        if isinstance(function, FunctionType):
            _verdicts[function, role] = found
    return found


def judge_calls(function: object) -> Verdict:
    """Whether a library's function, and all that it calls by name in turn, are what the libraries' files say, whatever
    their version: nobody has replaced or wrapped one of them."""
    found = _verdicts.get((function, "calls")) if isinstance(function, FunctionType) else None
    if found is None or not all(lookup.holds() for lookup in found.lookups):
        lookups: list[Lookup] = []
        try:
            _read_calls(function, set(), lookups)
        except _Unknown as reason:
            found = Verdict(str(reason), tuple(lookups))
        else:
            found = Verdict(None, tuple(lookups))
        if isinstance(function, FunctionType):
            _verdicts[function, "calls"] = found
    return found


def _read_calls(function: object, seen: set[FunctionType], lookups: list[Lookup]) -> None:
    if not is_library(function):
        raise _Unknown(f"{getattr(function, '__qualname__', function)!s} is not a library's")
    function = _innermost(function)
    if function in seen or package_of(function) not in _READ_INTO:
        return
    seen.add(function)
    tree, namespace = _tree_of(function), function.__globals__
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & namespace.keys()):
        value = namespace[name]
        lookups.append(Lookup(namespace, name, value))
        if isinstance(value, FunctionType) and not package_of(value).startswith(_KERNELS):
            _read_calls(value, seen, lookups)
    _check_members(tree, namespace, lookups)


def _judge(function: object, role: str, what: str, named: str) -> Verdict:
    try:
        identity = identify(function)
    except _Unknown as reason:
        return Verdict(f"{what} is not known: {reason}", tuple(reason.lookups))
    if _learnt is not None:
        _learnt.setdefault((role, identity.digest), set()).add(named)
    elif identity.digest not in table().get(role, {}):
        return Verdict(f"{what} is not one that is known as {role.replace('_', ' ')}", identity.lookups)
    return Verdict(None, identity.lookups)


@torch.compiler.assume_constant_result  # a compiled graph asks when it is traced
def why_unknown(kind: type, role: str) -> str | None:
    """Why a class is not known as `role`, in words, or None."""
    return judge_class(kind, role).reason


@torch.compiler.assume_constant_result
def why_unknown_function(function: object, role: str) -> str | None:
    """Why a function is not known as `role`, in words, or None."""
    return judge_function(function, role).reason


@torch.compiler.assume_constant_result
def why_replaced(function: object) -> str | None:
    """Why a library's function may do something else than its file says, in words, or None."""
    return judge_calls(function).reason


def lookups_of(kinds: Collection[type]) -> Iterator[Lookup]:
    """What has to stay as it is for all that was said of these classes to hold."""
    for kind, role in list(_verdicts):
        if kind in kinds:
            yield from judge_class(kind, role).lookups


def namespace_of(kind: type) -> dict:
    """The global names that a known class's forward sees."""
    return _innermost(kind.forward).__globals__


def is_own(function: object) -> bool:
    """Whether a function is one of this package's, as it stands in its file."""
    try:
        function = _innermost(function)
    except _Unknown:
        return False
    return package_of(function) == "mmpeft_fast" and is_shipped(function, str(function.__globals__["__name__"]))


def is_library(function: object) -> bool:
    """Whether a function, inside its decorators, stands in the file of a library's module or of this package's."""
    try:
        function = _innermost(function)
    except _Unknown:
        return False
    module = str(function.__globals__.get("__name__"))
    return module.partition(".")[0] in _LIBRARIES and is_shipped(function, module)


def is_shipped(function: object, module: str) -> bool:
    """Whether a function is one that a library module ships: defined there, in that module's own file."""
    home = sys.modules.get(module)
    code = getattr(function, "__code__", None)
    return (
        home is not None
        and code is not None
        and getattr(function, "__module__", None) == module
        and code.co_filename == home.__file__
        and not hasattr(function, "__wrapped__")
    )

"""Tapes: what a function of tensors did, as straight-line code that does it again without deciding anything.

The schedules decide at every call how tensors lie, which kernel runs, with which tile and grid. On a GPU that takes the
host longer than the kernels take the device. None of it depends on the tensors' elements, so a call whose tensors have
the geometry of an earlier one takes the same steps: library ops, and launches of compiled kernels. The second such call
is recorded, later ones run the recording: a Python function with a line a step, in which every tensor is dropped after
its last use. A recording holds no tensor but tables of integers that are cached for good, so it serves all layers of a
model, and every batch of that length.

A tape changes no result: the same ops and kernels run on the same operands in the same order. MMPEFT_FAST_NO_TAPES=1
does without them.
"""

import itertools
import logging
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_Result = TypeVar("_Result")
# Tapes that are kept, the oldest dropped first; one is a few kilobytes.
_MOST = 2048
_aten = torch.ops.aten
# Python's names of ops, which parse their arguments several times faster than the op's own call does.
_BINDINGS: dict[object, Callable] = {
    _aten.add.Tensor: torch.add, _aten.add_.Tensor: Tensor.add_, _aten.addmm.default: torch.addmm,
    _aten.addmm_.default: Tensor.addmm_, _aten.cat.default: torch.cat, _aten.clone.default: torch.clone,
    _aten.copy_.default: Tensor.copy_, _aten.empty.memory_format: torch.empty,
    _aten.empty_like.default: torch.empty_like, _aten.mm.default: torch.mm, _aten.mul.Tensor: torch.mul,
    _aten.mul.out: torch.mul, _aten.new_empty.default: Tensor.new_empty, _aten.zero_.default: Tensor.zero_,
}  # fmt: skip
# Results, or what is done next, depend on elements; memory is given to a tensor that had other memory.
_NOT_AGAIN = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view)

_logger = logging.getLogger(__name__)
_enabled = os.environ.get("MMPEFT_FAST_NO_TAPES") != "1"
_SEEN, _REFUSED = object(), object()
_tapes: "OrderedDict[Hashable, object]" = OrderedDict()


@contextmanager
def no_tapes() -> Iterator[None]:
    """Inside, every call runs its function: for what looks at single steps, or changes how they are chosen."""
    global _enabled
    before, _enabled = _enabled, False
    try:
        yield
    finally:
        _enabled = before


def is_on() -> bool:
    return _enabled


def forget() -> None:
    """Forgets all tapes: what they were recorded from is decided otherwise now."""
    _tapes.clear()


def run_step(step: Callable, runner, arguments: tuple, tensors: Sequence[Tensor | None], *, check=None, state=None):
    """step(runner, *arguments, *tensors), by `run` where the runner's calls are taped.

    step: a function of its arguments and `state` alone; they are the key. check: called before the step, and not where
    a call of this geometry was checked when it was recorded.
    """

    def function(*tensors):
        if check is not None:
            check()
        return step(runner, *arguments, *tensors)

    if not runner.is_taped:
        return function(*tensors)
    return run((step, runner, arguments, state), tensors, function)


def run(key: Hashable, tensors: Sequence[Tensor | None], function: Callable[..., _Result]) -> _Result:
    """function(*tensors), from a tape where a call of the same key and geometry was recorded.

    key: everything but the tensors that the function depends on. tensors: all on one device. The result is a nest of
    tensors, named tuples, tuples, lists, numbers and None.
    """
    if not _enabled or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return function(*tensors)
    geometry = _geometry(tensors)
    if geometry is None:
        return function(*tensors)
    device = next(tensor.device for tensor in tensors if tensor is not None)
    key = (key, device, torch.are_deterministic_algorithms_enabled(), *geometry)
    tape = _tapes.get(key)
    if callable(tape):
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return tape(*tensors)
        return tape(*tensors)
    if tape is _SEEN and device.type != "meta":
        return _record(key, tensors, function)
    if tape is None:
        _tapes[key] = _SEEN
        while len(_tapes) > _MOST:
            _tapes.popitem(last=False)
    return function(*tensors)


def _geometry(tensors: Sequence[Tensor | None]) -> list | None:
    """What a function of tensors may decide by, their elements aside: shapes, strides, dtypes, alignment, spare columns
    (`ops.layout`), which of them lie in one storage, and where. None where a tensor is more than its elements."""
    found: list = []
    first: dict[int, tuple[int, int]] = {}
    for tensor in tensors:
        if tensor is None:
            found.append(None)
            continue
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return None
        offset = tensor.storage_offset()
        number, start = first.setdefault(tensor.untyped_storage()._cdata, (len(first), offset))
        found += (
            tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16, number, offset - start,
            getattr(tensor, "spare_columns", 0),
        )  # fmt: skip
    return found


def _record(key: Hashable, tensors: Sequence[Tensor | None], function: Callable[..., _Result]) -> _Result:
    from mmpeft_kernels.launch import observed

    recording = _Recording(tensors)
    with recording, observed(recording.launch):
        result = function(*tensors)
    _tapes[key] = recording.compiled(result)
    return result


def _place(tensor: Tensor) -> tuple:
    return tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


class _Storage(NamedTuple):
    """Memory that a recording knows: the name of the first tensor there, its offset, and all names by place."""

    base: str
    offset: int
    dtype: torch.dtype
    names: dict[tuple, str]


class _Step(NamedTuple):
    """A line of a tape: the names it assigns and reads, and whether it may be left out where nothing reads those."""

    text: str
    assigns: tuple[str, ...]
    reads: tuple[str, ...]
    is_pure: bool


class _Recording(TorchDispatchMode):
    """Library ops and kernel launches in their order.

    Tensors are known by where they lie and how: autograd's bookkeeping gives new objects to old tensors. A view is made
    in one step from the first tensor in its storage, however many views there were between them.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        super().__init__()
        self._steps: list[_Step] = []
        self._storages: dict[int, _Storage] = {}
        self._constants: dict[str, object] = {}
        self._names_of_constants: dict[int, str] = {}
        self._reads: list[str] = []
        self._number = itertools.count()
        self._why_not: str | None = None
        self._inputs = [f"i{number}" for number in range(len(tensors))]
        for name, tensor in zip(self._inputs, tensors, strict=True):
            if tensor is not None:
                known = self._storages.get(tensor.untyped_storage()._cdata)
                if known is None:
                    self._enter(tensor, name)
                else:
                    known.names.setdefault(_place(tensor), name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = func._schema
        is_view = bool(schema.returns) and all(
            value.alias_info is not None and not value.alias_info.is_write for value in schema.returns
        )
        self._reads = []
        call = "" if is_view else self._call(_BINDINGS.get(func, func._op), args, kwargs)
        reads = tuple(self._reads)
        result = func(*args, **kwargs)
        if any(tag in func.tags for tag in _NOT_AGAIN):
            self._why_not = f"{func} cannot be taken again"
        if is_view:
            return result
        if schema.is_mutable or not schema.returns:
            self._steps.append(_Step(call, (), reads, False))
            return result
        results = result if isinstance(result, tuple | list) else (result,)
        names = tuple(self._fresh() for _ in results)
        for tensor, name in zip(results, names, strict=True):
            if isinstance(tensor, Tensor):
                self._enter(tensor, name)
        unpacked = f"{', '.join(names)}{',' if results is result else ''}"
        is_pure = torch.Tag.nondeterministic_seeded not in func.tags
        self._steps.append(_Step(f"{unpacked} = {call}", names, reads, is_pure))
        return result

    def launch(self, kernel, grid: tuple[int, ...], args: tuple, options: dict, run: Callable) -> None:
        """Launches a kernel: an observer as of `mmpeft_kernels.launch.observed`."""
        with _disable_current_modes():
            compiled = run()
        self._reads = []
        if compiled is None:  # by Triton's interpreter
            text = self._call(kernel[grid], args, options)
        else:
            values = dict(zip(kernel.arg_names, args, strict=False)) | options
            given = [self._operand(values[name]) for name in kernel.arg_names]
            text = f"{self._constant(compiled[(*grid, 1, 1)[:3]])}({', '.join(given)}, stream=stream)"
        self._steps.append(_Step(text, (), tuple(self._reads), False))

    def compiled(self, result: object) -> object:
        """The tape as a function of the inputs, or `_REFUSED`."""
        self._reads = []
        returned = self._text(result)
        if self._why_not is not None:
            _logger.debug("not taped: %s", self._why_not)
            return _REFUSED
        lines, needed = [f"    return {returned}"], set(self._reads)
        for step in reversed(self._steps):
            if step.is_pure and needed.isdisjoint(step.assigns):
                continue
            over = sorted({*step.assigns, *step.reads}.difference(needed, self._inputs))
            if over:
                lines.append(f"    del {', '.join(over)}")
            lines.append(f"    {step.text}")
            needed.update(step.reads)
        if any("stream=stream" in line for line in lines):
            from mmpeft_kernels.launch import current_stream

            lines.append(f"    stream = {self._constant(current_stream)}()")
        lines.append(f"def tape({', '.join(self._inputs)}):")
        space = dict(self._constants)
        exec("\n".join(reversed(lines)), space)  # the text is made above, of names and numbers
        return space["tape"]

    def _fresh(self) -> str:
        return f"v{next(self._number)}"

    def _enter(self, tensor: Tensor, name: str) -> None:
        """A tensor in memory of its own; what was known of that memory is over."""
        storage = _Storage(name, tensor.storage_offset(), tensor.dtype, {_place(tensor): name})
        self._storages[tensor.untyped_storage()._cdata] = storage

    def _operand(self, value: object) -> str:
        """An argument of a compiled kernel: of a tensor it reads the address alone."""
        if not isinstance(value, Tensor):
            return self._text(value)
        known = self._storages.get(value.untyped_storage()._cdata)
        if known is None:
            return f"{self._tensor(value)}.data_ptr()"
        self._reads.append(known.base)
        offset = self._offset(value, known) * value.element_size()
        return f"{known.base}.data_ptr()" + (f" + {offset}" if offset else "")

    def _offset(self, tensor: Tensor, known: _Storage) -> int:
        """Elements between the first tensor in the memory and this one."""
        if tensor.dtype != known.dtype:
            self._why_not = "a view of another dtype"
        return tensor.storage_offset() - known.offset

    def _tensor(self, tensor: Tensor) -> str:
        known = self._storages.get(tensor.untyped_storage()._cdata)
        if known is None:
            if tensor.dtype != torch.int32:  # the kernels' tables of segments
                self._why_not = f"a tensor of {tensor.dtype} came from elsewhere"
            return self._constant(tensor)
        name = known.names.get(_place(tensor))
        if name is None:
            offset = self._offset(tensor, known)
            at = f", {known.base}.storage_offset() + {offset}" if offset else ""
            name = known.names[_place(tensor)] = self._fresh()
            text = f"{name} = {known.base}.as_strided({tuple(tensor.shape)}, {tensor.stride()}{at})"
            self._steps.append(_Step(text, (name,), (known.base,), True))
        self._reads.append(name)
        return name

    def _call(self, function: Callable, args: Sequence, kwargs: dict) -> str:
        given = [self._text(value) for value in args]
        given += [f"{name}={self._text(value)}" for name, value in kwargs.items()]
        return f"{self._constant(function)}({', '.join(given)})"

    def _text(self, value: object) -> str:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return repr(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._call(type(value), value, {})
        if isinstance(value, tuple | list):
            inside = "".join(f"{self._text(part)}, " for part in value)
            return f"[{inside}]" if isinstance(value, list) else f"({inside})"
        if hasattr(value, "block_shape"):
            return f"{self._constant(_descriptors_like(value))}({self._text(value.base)})"
        return self._constant(value)

    def _constant(self, value: object) -> str:
        name = self._names_of_constants.get(id(value))
        if name is None:
            name = self._names_of_constants[id(value)] = f"c{len(self._constants)}"
            self._constants[name] = value
        return name


def _descriptors_like(descriptor) -> Callable[[Tensor], object]:
    """Makes Triton's descriptor of another tensor of the same shape and strides."""
    kind, fields = type(descriptor), {name: value for name, value in vars(descriptor).items() if name != "base"}

    def describe(base: Tensor) -> object:
        made = object.__new__(kind)
        made.__dict__ = {"base": base, **fields}
        return made

    return describe

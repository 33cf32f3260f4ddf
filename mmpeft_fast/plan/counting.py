"""Counting what a step launches: FLOPs, bytes moved and launches of every op, by part and phase.

FLOPs follow torch's FlopCounterMode: 2 M N K for a product, attention without regard to causality. An op moves its
operands once: what it reads plus what it writes. Views, allocations and ops on nothing are free.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mmpeft_fast.plan.parts import ATTENTION_BACKWARD_OPS, ATTENTION_OPS, Regions, part_of
from mmpeft_fast.plan.placeholders import is_placeholder

_FREE = frozenset(
    ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
     "_unsafe_view", "_reshape_alias", "set_", "_local_scalar_dense", "is_same_size", "_has_same_storage_numel")
)  # fmt: skip
# Ops that read only as much of their first operand as they write.
_SELECTING = frozenset(("embedding", "gather", "index", "index_select"))
_OVERWRITING = frozenset(("copy_", "fill_", "zero_", "uniform_", "normal_", "random_", "bernoulli_"))
# The kernel whose products are the gradients of weights in calls where another one makes the other products, and
# kernels that add up what others left.
_OF_WEIGHTS = "_ddown_kernel"
_SUMS = ("_sum_kernel", "_finish_kernel")
# Products in place, which the registry of FLOP rules does not know.
_OUT_OF_PLACE = {"addmm_": torch.ops.aten.addmm, "baddbmm_": torch.ops.aten.baddbmm}


class Launch(NamedTuple):
    """One launch of a kernel inside a call of the kernel set; kernel: the name of the Triton kernel or of torch's op.

    flops: of its products, those of the whole call that it makes.
    """

    kernel: str
    bytes: int
    is_triton: bool
    flops: int = 0


class Work(NamedTuple):
    """One launch, or one call of the kernel set with the launches it makes.

    kind: gemm, attention, attention_backward, memory or irregular; weight_flops: those of `flops` that make gradients
    of weights; causal: half of attention's scores are needed; inside: the launches of a call of the kernel set.
    """

    part: str
    op: str
    phase: str  # forward, recompute, backward or optimizer
    kind: str
    dtype: torch.dtype
    flops: int
    bytes: int
    launches: int
    weight_flops: int = 0
    causal: bool = False
    inside: tuple[Launch, ...] = ()


def moved_bytes(tensor: Tensor) -> int:
    """Bytes of memory that a tensor's elements lie in; elements of an expanded dimension are the same ones."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride or not length else 1
    return size


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *, backward: bool) -> int:
    """Two products of q's heads with k and v [B, HK, T, DH] forward, five backward, which redoes the first."""
    batch, heads, rows, head_dim = q.shape
    columns, value_dim = k.shape[2], v.shape[3]
    depth = 3 * head_dim + 2 * value_dim if backward else head_dim + value_dim
    return 2 * batch * heads * rows * columns * depth


def op_flops(func, args: tuple, kwargs: dict, out) -> int:
    """FLOPs of an op of torch, by the rules of its FlopCounterMode; what that leaves out, products in place and the
    CPU's flash attention, counts as their like."""
    name = func.overloadpacket.__name__
    if name in ATTENTION_OPS and name.startswith("_scaled"):
        return attention_flops(*args[:3], backward=False)
    if name in ATTENTION_BACKWARD_OPS and name.startswith("_scaled"):
        return attention_flops(*args[1:4], backward=True)
    rule = flop_registry.get(_OUT_OF_PLACE.get(name, func.overloadpacket))
    return 0 if rule is None else rule(*args, **kwargs, out_val=out)


def weight_flops(func, args: tuple, flops: int) -> int:
    """`flops` where a product sums over rows, as gradients of weights do: its left operand is transposed; else 0."""
    if func.overloadpacket.__name__ not in ("mm", "addmm", "addmm_"):
        return 0
    left = args[-2]
    return flops if left.stride(0) == 1 and left.stride(1) >= left.shape[0] > 1 else 0


def tensors_in(tree) -> list[Tensor]:
    """Every tensor of nested arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def op_bytes(func, args: tuple, kwargs: dict, out) -> int:
    """Bytes that an op reads and writes, every operand once."""
    name = func.overloadpacket.__name__
    written = tensors_in(out)
    if out is None:  # lists of tensors changed in place
        changed = [arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments]
        written = tensors_in([arg for arg, is_changed in zip(args, changed, strict=False) if is_changed])
    if name in _SELECTING:
        read = [*written, *tensors_in(args[1:])]
    else:
        inputs = args[1:] if name in _OVERWRITING else args
        read = tensors_in((inputs, {key: value for key, value in kwargs.items() if key != "out"}))
    return sum(moved_bytes(tensor) for tensor in (*read, *written))


def is_free(func) -> bool:
    """Whether an op launches nothing: it returns a view, allocates or only looks."""
    if func not in _is_free:
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        _is_free[func] = is_view or func.overloadpacket.__name__ in _FREE
    return _is_free[func]


_is_free: dict[object, bool] = {}


def kind_of(op: str, flops: int, *, is_regular: bool = True) -> str:
    """Which of a device's rates an op runs at: attention, attention_backward, gemm, memory or irregular."""
    if op in ATTENTION_OPS:
        return "attention"
    if op in ATTENTION_BACKWARD_OPS:
        return "attention_backward"
    if flops:
        return "gemm"
    return "memory" if is_regular else "irregular"


def is_regular(operands: list[Tensor]) -> bool:
    """Whether an op walks through all its operands in one line, as torch's vectorised kernels need it: they have one
    shape and lie in memory in one order, and none is read in a narrower dtype than the result's (torch converts such
    element by element). Numbers as tensors do not count; gathers, reductions and joined tensors are irregular."""
    whole = [tensor for tensor in operands if tensor.numel() > 1]
    if not whole:
        return True
    shapes = {(tensor.shape, tensor.stride()) for tensor in whole}
    widths = [tensor.element_size() for tensor in whole if tensor.dtype != torch.bool]
    return len(shapes) == 1 and _is_dense(whole[0]) and (not widths or min(widths) >= widths[-1])


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill their memory, each once, in any order of dimensions."""
    filled = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length != 1 and stride != filled:
            return False
        filled *= length
    return True


def _with_products(launched: list[Launch], flops: int, of_weights: int) -> tuple[Launch, ...]:
    """The launches of a call with its FLOPs. Torch's ops have theirs; of what is left, the products of weights'
    gradients go to the kernel that makes them alone, the rest to the first of the other Triton kernels."""
    left = flops - sum(each.flops for each in launched)
    apart = [i for i, each in enumerate(launched) if each.kernel == _OF_WEIGHTS]
    others = [i for i, each in enumerate(launched) if each.is_triton and each.kernel not in (_OF_WEIGHTS, *_SUMS)]
    found = list(launched)
    for i in apart:
        found[i] = found[i]._replace(flops=(min(of_weights, left) if others else left) // len(apart))
    if others:
        found[others[0]] = found[others[0]]._replace(flops=left - (min(of_weights, left) if apart else 0))
    return tuple(found)


def is_causal(func, args: tuple, kwargs: dict) -> bool:
    """The value of an attention op's `is_causal` argument."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "is_causal":
            return bool(kwargs.get("is_causal", args[position] if position < len(args) else False))
    return False


class FlopSum(TorchDispatchMode):
    """FLOPs of the ops inside: `total`, and `of_weights`, those of weights' gradients."""

    def __init__(self):
        super().__init__()
        self.total = self.of_weights = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flops = op_flops(func, args, kwargs or {}, out)
        self.total += flops
        self.of_weights += weight_flops(func, args, flops) if flops else 0
        return out


class Recorder(TorchDispatchMode):
    """Counts the work that runs inside: `sequence` has every piece of it in the order in which it was queued."""

    def __init__(self, regions: Regions):
        super().__init__()
        self.sequence: list[Work] = []
        self.regions = regions
        self._phase: str | None = None
        self._call: list[Launch] | None = None  # those of the call of the kernel set that runs

    @property
    def works(self) -> Counter[Work]:
        """Every distinct piece of work and how often it ran."""
        return Counter(self.sequence)

    @property
    def phase(self) -> str:
        if self._phase is not None:
            return self._phase
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Everything inside is of this phase."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (
            is_free(func)
            or self._is_table(func, args, out)
            or not any(t.numel() for t in tensors_in((args, kwargs, out)))
        ):
            return out
        name, moved = func.overloadpacket.__name__, op_bytes(func, args, kwargs, out)
        flops = op_flops(func, args, kwargs, out)
        if self._call is not None:
            self._call.append(Launch(name, moved, is_triton=False, flops=flops))
            return out
        written = tensors_in(out) or tensors_in(args)
        dtype = written[0].dtype if written else torch.float32
        of_weights = weight_flops(func, args, flops) if flops else 0
        causal = is_causal(func, args, kwargs) if flops else False
        regular = bool(flops) or is_regular([*tensors_in((args, kwargs)), *written])
        self._add(name, dtype, (flops, of_weights), moved, causal=causal, regular=regular)
        return out

    def _is_table(self, func, args: tuple, out) -> bool:
        """Whether a kernel's table of segments goes to the device, which happens once for each shape."""
        if self._call is None or func.overloadpacket.__name__ != "_to_copy" or is_placeholder(args[0]):
            return False
        return args[0].dtype == out.dtype

    def _add(
        self, op: str, dtype: torch.dtype, flops: tuple[int, int], moved: int, *, causal: bool = False,
        regular: bool = True, inside: tuple[Launch, ...] = (),
    ) -> None:  # fmt: skip
        """flops: all, and those of weights' gradients (in a backward pass)."""
        phase = self.phase
        part = "optimizer" if phase == "optimizer" else part_of(self.regions.current, op)
        of_weights = flops[1] if phase == "backward" else 0
        launches = len(inside) or 1
        self.sequence.append(
            Work(
                part, op, phase, kind_of(op, flops[0], is_regular=regular), dtype, flops[0], moved, launches,
                of_weights, causal, inside,
            )
        )  # fmt: skip

    def launch(self, kernel: str, operands: list[Tensor]) -> None:
        """A launch of a Triton kernel, which torch's dispatcher does not see: reads or writes each operand once."""
        launched = Launch(kernel, sum(moved_bytes(tensor) for tensor in operands), is_triton=True)
        if self._call is None:
            self._add(kernel, operands[0].dtype, (0, 0), launched.bytes, inside=(launched,))
        else:
            self._call.append(launched)

    def call(self, op: str, function: Callable, dtype: torch.dtype, flops: tuple[int, int]):
        """Runs `function()` and counts all it launches as one work with this name and these FLOPs: all, and those of
        weights' gradients."""
        if self._call is not None:
            return function()
        self._call = []
        try:
            result = function()
            launched = self._call
        finally:
            self._call = None
        if launched:
            moved = sum(each.bytes for each in launched)
            self._add(op, dtype, flops, moved, inside=_with_products(launched, *flops))
        return result

"""Every op that code runs, as work of a part of the model, with a mark in the profiler's trace that finds it again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from mmpeft_fast.ops import kernels_torch
from mmpeft_fast.plan.counting import (
    FlopSum,
    Work,
    is_causal,
    is_free,
    kind_of,
    moved_bytes,
    op_bytes,
    op_flops,
    tensors_in,
    weight_flops,
)
from mmpeft_fast.plan.parts import part_of
from mmpeft_fast.plan.placeholders import Placeholders
from mmpeft_fast.profiling.storages import Storages

MARK = "mmpeft_fast "  # a mark's name: this, the work's number, part and op
# The extension's ops write into tensors that the caller gives: each operand is read or written once.
_EXTENSION = ("mmpeft_fast_c", "mmpeft_fast_cuda")
_NO_KERNELS = ("unsupported", "keep_bits")


class Places(Protocol):
    """What runs now: "decoder" or one of `plan.parts.PARTS`."""

    current: str


class OneRegion:
    """Stands in for `Regions` where no model of a known family is given: parts follow from the ops alone."""

    current = "decoder"


def _name(func, args: tuple) -> str:
    """An op's name; ops of the extension that compute one of several things say which first."""
    name = func.overloadpacket.__name__
    return f"{name} {args[0]}" if func.namespace in _EXTENSION and args and isinstance(args[0], str) else name


class Tracer(TorchDispatchMode):
    """Notes the work of every op inside (`works`, by number) and the storages it sees (`storages`)."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places
        self.works: dict[int, Work] = {}
        self.storages = Storages()
        self.in_optimizer = False
        self.on_gpu = False  # whether any tensor was
        self.num_marks = 0
        self._in_call = False
        self._defined_flops: dict[str, tuple[int, int]] = {}

    @property
    def phase(self) -> str:
        if self.in_optimizer:
            return "optimizer"
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    @contextmanager
    def _marked(self, name: str) -> Iterator[tuple[int, str, str]]:
        """A mark around what runs inside; yields the work's number, part and phase."""
        phase = self.phase
        part = "optimizer" if phase == "optimizer" else part_of(self.places.current, name)
        self.storages.enter(phase)
        number = self.num_marks
        self.num_marks += 1
        self.storages.position = self.num_marks
        with record_function(f"{MARK}{number} {part}: {name}"):
            yield number, part, phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs))
        parameters = [tensor for tensor in inputs if isinstance(tensor, torch.nn.Parameter)]
        self.storages.see(parameters, "parameters", before=True)
        self.storages.see(inputs, before=True)
        touches_memory = inputs or any("Tensor" in str(value.type) for value in func._schema.returns)
        if self._in_call or is_free(func) or not touches_memory:
            out = func(*args, **kwargs)
        else:
            name = _name(func, args)
            with self._marked(name) as (number, part, phase):
                out = func(*args, **kwargs)
            self.works[number] = _work(func, name, part, phase, args, kwargs, out)
        outs = tensors_in(out)
        self.storages.see(outs)
        self.on_gpu = self.on_gpu or any(tensor.is_cuda for tensor in (*inputs, *outs))
        return out

    def call(self, name: str, function: Callable, args: tuple, kwargs: dict):
        """Runs a call of the kernel set, whose launches torch's dispatcher does not see, as one work. Its FLOPs are
        those of its definition; its bytes, of its operands and results."""
        if self._in_call:
            return function(*args, **kwargs)
        label = f"{name} {args[0].name}" if name in ("prologue", "prologue_backward") else name
        self._in_call = True
        try:
            with self._marked(label) as (number, part, phase):
                out = function(*args, **kwargs)
        finally:
            self._in_call = False
        flops, of_weights = self._flops_of_call(name, args, kwargs)
        operands = {id(tensor): tensor for tensor in tensors_in((args, kwargs, out))}.values()
        self.works[number] = Work(
            part, label, phase, kind_of(name, flops), next(tensor.dtype for tensor in operands if tensor.dim() > 1),
            flops, sum(map(moved_bytes, operands)), 1, of_weights if phase == "backward" else 0,
        )  # fmt: skip
        return out

    def _flops_of_call(self, name: str, args: tuple, kwargs: dict) -> tuple[int, int]:
        with _disable_current_modes(), torch.no_grad():
            meta = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            signature = f"{name} {meta}"  # tensors on meta print as shape and dtype
            if signature not in self._defined_flops:
                with Placeholders("cuda"), FlopSum() as flops:
                    getattr(kernels_torch, name)(*meta[0], **meta[1])
                self._defined_flops[signature] = flops.total, flops.of_weights
        return self._defined_flops[signature]


def _work(func, name: str, part: str, phase: str, args: tuple, kwargs: dict, out) -> Work:
    flops = op_flops(func, args, kwargs, out)
    operands = tensors_in(out) or tensors_in(args)
    if func.namespace in _EXTENSION:
        moved = sum(map(moved_bytes, tensors_in((args, kwargs, out))))
    else:
        moved = op_bytes(func, args, kwargs, out)
    of_weights = weight_flops(func, args, flops) if flops and phase == "backward" else 0
    causal = is_causal(func, args, kwargs) if flops else False
    return Work(part, name, phase, kind_of(name, flops), operands[0].dtype, flops, moved, 1, of_weights, causal)


@contextmanager
def traced_kernel_sets(tracer: Tracer) -> Iterator[None]:
    """Calls of the Triton and CUDA kernel sets inside are work of `tracer`; afterwards they are as before."""
    from mmpeft_fast.ops import kernels_cuda, kernels_triton

    def traced(name: str, kernel: Callable) -> Callable:
        return lambda *args, **kwargs: tracer.call(name, kernel, args, kwargs)

    before = []
    try:
        for module in (kernels_triton, kernels_cuda):
            for name in module.__all__:
                if name not in _NO_KERNELS:
                    kernel = getattr(module, name)
                    before.append((module, name, kernel))
                    setattr(module, name, traced(name, kernel))
        yield
    finally:
        for module, name, kernel in before:
            setattr(module, name, kernel)

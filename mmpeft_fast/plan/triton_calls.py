"""Counting the Triton provider: its launchers run on meta tensors, its kernels are recorded instead of launched.

A call of the kernel set counts as one work. Its FLOPs are those of the same call on the torch provider, which defines
the kernel set; its bytes are the operands of its launches, each pointer once.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten

from mmpeft_fast.ops import dispatch, kernels_torch
from mmpeft_fast.plan.counting import FlopSum, Recorder
from mmpeft_fast.plan.placeholders import Placeholders

_NO_KERNELS = ("adds_in_dx", "unsupported", "keep_bits")


def _signature(args: tuple, kwargs: dict) -> tuple:
    """What the FLOPs of a call depend on: shapes, dtypes and everything that is not a tensor."""
    leaves, spec = tree_flatten((args, kwargs))
    return str(spec), *((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)


class _DefinedFlops:
    """FLOPs of calls of the kernel set, all and of weights' gradients, by running their definition on meta tensors."""

    def __init__(self):
        self._known: dict[tuple, tuple[int, int]] = {}

    def __call__(self, name: str, args: tuple, kwargs: dict) -> tuple[int, int]:
        key = (name, *_signature(args, kwargs))
        if key not in self._known:
            with _disable_current_modes(), torch.no_grad(), Placeholders("cuda"), FlopSum() as flops:
                getattr(kernels_torch, name)(*args, **kwargs)
            self._known[key] = flops.total, flops.of_weights
        return self._known[key]


def _label(name: str, args: tuple) -> str:
    """The call's name; a prologue's with what it computes."""
    return f"{name} {args[0].name}" if name in ("prologue", "prologue_backward") else name


def _first_dtype(args: tuple, kwargs: dict) -> torch.dtype:
    """Of the activations: the first operand with more than one dimension."""
    leaves, _ = tree_flatten((args, kwargs))
    return next(leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 1)


@contextmanager
def dispatched_as(gpu_name: str) -> Iterator[None]:
    """Meta tensors inside are dispatched as tensors on the GPU of this name are: ways of the GEMM and of dy's pass,
    layouts, tiles. A GPU without a table is taken to run Triton's kernels."""
    from mmpeft_kernels.tile import architecture, assumed_architecture

    table = dispatch.table_named(gpu_name)
    replaced = {
        "is_gpu": lambda device: True,
        "table_of": lambda device: table,
        "why_no_triton": lambda device: None,
        "_measured": dispatch._measured.__wrapped__,  # its cache is of the GPU that is there
        "_architecture": lambda device: architecture(torch.device("meta")),
        "_say_unmeasured": lambda *what: None,  # nothing runs
    }
    with ExitStack() as stack:
        if table is not None:
            stack.enter_context(assumed_architecture(table.architecture))
        for name, replacement in replaced.items():
            stack.callback(setattr, dispatch, name, getattr(dispatch, name))
            setattr(dispatch, name, replacement)
        yield


@contextmanager
def counted_triton(recorder: Recorder) -> Iterator[None]:
    """Fused ops inside run on the Triton provider, on meta tensors, and are counted by `recorder`.

    Raises:
        ValueError: Triton is not installed, or interprets its kernels (TRITON_INTERPRET).
    """
    from mmpeft_fast.ops.providers import provider

    with ExitStack() as stack:
        stack.enter_context(provider("triton"))
        import triton
        from triton.runtime.jit import JITFunction

        if triton.knobs.runtime.interpret:
            raise ValueError("plan: expected TRITON_INTERPRET to be unset, as kernels are counted, not interpreted")
        from mmpeft_fast.ops import kernels_triton

        defined = _DefinedFlops()

        def observe(name: str, kernel):
            def observed(*args, **kwargs):
                flops = defined(name, args, kwargs)
                dtype = _first_dtype(args, kwargs)
                return recorder.call(_label(name, args), lambda: kernel(*args, **kwargs), dtype, flops)

            return observed

        def launch(kernel, *args, grid, warmup, **kwargs):
            operands = (getattr(value, "base", value) for value in (*args, *kwargs.values()))
            recorder.launch(kernel.fn.__name__, [value for value in operands if isinstance(value, Tensor)])

        replaced = [(JITFunction, "run", launch)]
        for name in kernels_triton.__all__:
            if name not in _NO_KERNELS:
                replaced.append((kernels_triton, name, observe(name, getattr(kernels_triton, name))))
        for home, name, replacement in replaced:
            stack.callback(setattr, home, name, getattr(home, name))
            setattr(home, name, replacement)
        yield

"""Where a step's time goes: its kernels by kind, with the least time that their bytes or operations would take."""

import importlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bench.gpu.judge import mapped

# Kinds by what a kernel's name holds, the first that fits; functions of the kernel set by the kind that runs them.
_KINDS = (
    ("prologue_backward", ("prologue_backward",)),
    ("prologue", ("prologue",)),
    ("shrink", ("shrink",)),
    ("ddown", ("ddown",)),
    ("dy_pass", ("dy_pass", "dypass", "_finish_kernel")),
    ("lowrank_gemm", ("lowrank_gemm",)),
    ("rotary", ("rotary", "heads")),
    ("cross_entropy", ("cross_entropy", "softmax")),
    ("partial sums", ("sum_partials", "_sum_kernel")),
    ("attention", ("flash", "fmha", "sdpa", "cudnn", "attention")),
    ("library GEMM", ("nvjet", "cutlass", "gemm", "xmma", "cublas")),
    ("AdamW", ("multi_tensor", "adam")),
)
_OF_FUNCTION = {
    "prologue": "prologue", "dy_pass": "dy_pass", "lowrank_gemm": "lowrank_gemm", "lowrank_gemm_dx": "lowrank_gemm",
    "heads": "rotary", "heads_backward": "rotary", "cross_entropy_": "cross_entropy",
    "prologue_backward": "prologue_backward",
}  # fmt: skip
_OTHER = "elementwise"
_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "addmm_")
_PROVIDERS = ("torch", "triton", "cuda", "cpu")
# Products are all that is wanted of FLOPs, and torch's counts of attention refuse fewer heads of keys than of queries.
_NOT_COUNTED = {op: lambda *args, **options: 0 for op in flop_registry if "attention" in str(op)}


class Profiled(NamedTuple):
    """kernels: (name, milliseconds) of every launch of a step, copies and fills included."""

    kernels: list[tuple[str, float]]

    @property
    def launches(self) -> int:
        return len(self.kernels)

    @property
    def total_ms(self) -> float:
        return sum(ms for _, ms in self.kernels)


def profiled(step: Callable[[], object], device: str) -> Profiled:
    """What one step runs on the GPU; on a CPU its operators stand for kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == wanted]
    return Profiled([(e.name, (e.time_range.elapsed_us() if on_gpu else e.self_cpu_time_total) / 1e3) for e in events])


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    return next((kind for kind, parts in _KINDS if any(part in name for part in parts)), _OTHER)


def _bytes(*trees) -> int:
    """Of all tensors, each once."""
    seen: dict[int, int] = {}

    def add(tensor: Tensor) -> Tensor:
        seen[id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    mapped(trees, add)
    return sum(seen.values())


class _LibraryBytes(TorchDispatchMode):
    """Bytes that the library's operators read and write, by kind; inside functions of the kernel set only products."""

    def __init__(self, found: Counter, inside: list[str]):
        super().__init__()
        self._found, self._inside = found, inside

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(
            result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns
        )
        name = func._schema.name.split("::")[-1]
        is_work = not is_view and "empty" not in name
        if is_work and (not self._inside or name in _MATRIX_PRODUCTS):
            kind = "library GEMM" if name in _MATRIX_PRODUCTS else kind_of(name)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self._found[kind] += _bytes(tensors)
        return out


@contextmanager
def _counted(found: Counter, inside: list[str]) -> Iterator[None]:
    """Adds the operands and results of every call of the kernel set, each once, to `found`."""
    replaced = []

    def counting(name: str, function: Callable) -> Callable:
        def call(*args, **options):
            inside.append(name)
            try:
                out = function(*args, **options)
            finally:
                inside.pop()
            if not inside:
                found[_OF_FUNCTION[name]] += _bytes(args, options, out)
            return out

        return call

    for provider in _PROVIDERS:
        try:
            module = importlib.import_module(f"mmpeft_fast.ops.kernels_{provider}")
        except ImportError:  # not installed, so not called
            continue
        for name in _OF_FUNCTION:
            if hasattr(module, name):
                replaced.append((module, name, getattr(module, name)))
                setattr(module, name, counting(name, getattr(module, name)))
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def table_of_kernels(step: Callable[[], object], counted: Profiled, rates: dict[str, float]) -> Iterator[dict]:
    """A row for each kind of kernel, the longest first: {"kernel", "count", "ms", "least_gb", "least_ms", "roofline"}.

    rates: the machine's `copy_gb_s` and `gemm_tflops`. least_gb: operands read once and results written once; least_ms:
    what these bytes take at the rate of a copy, for the library's GEMMs what their operations take if that is more;
    roofline: its share of the time. The bytes of ddown are prologue_backward's.
    """
    found: Counter = Counter()
    inside: list[str] = []
    with (
        FlopCounterMode(display=False, custom_mapping=_NOT_COUNTED) as flops,
        _counted(found, inside),
        _LibraryBytes(found, inside),
    ):
        step()
    times: dict[str, list[float]] = defaultdict(list)
    for name, ms in counted.kernels:
        times[kind_of(name)].append(ms)
    for kind, each in sorted(times.items(), key=lambda pair: -sum(pair[1])):
        total = sum(each)
        least_ms = found[kind] / rates["copy_gb_s"] / 1e6
        if kind == "library GEMM":
            counts = flops.get_flop_counts()["Global"]
            least_ms = max(least_ms, sum(counts.values()) / rates["gemm_tflops"] / 1e9)
        known = {"least_gb": found[kind] / 1e9, "least_ms": least_ms, "roofline": least_ms / total if total else None}
        yield {"kernel": kind, "count": len(each), "ms": total, **(known if found[kind] else {})}


def markdown(rows: list[dict]) -> str:
    """The table of every step among profile rows."""
    steps: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for row in rows:
        steps[row["name"], row["implementation"]].append(row)
    lines = []
    for (name, implementation), kernels in steps.items():
        lines += [
            f"\n## {name}: {implementation}, {sum(row['ms'] for row in kernels):.1f} ms\n",
            "| kernel | launches | ms | least GB | least ms | roofline |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in kernels:
            values = [
                f"{row[key]:.2f}" if row.get(key) is not None else "" for key in ("least_gb", "least_ms", "roofline")
            ]
            lines.append(f"| {row['kernel']} | {row['count']} | {row['ms']:.2f} | " + " | ".join(values) + " |")
    return "\n".join(lines).lstrip() + "\n" if lines else ""

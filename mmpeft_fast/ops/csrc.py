"""The native extension: whether it is there, why not, and fakes of its ops.

`torch.ops.mmpeft_fast_c.*` (C++): every op writes to tensors that the caller gives and returns nothing (csrc/cpu/ops.h
says what each does), so a fake has nothing to do. `torch.ops.mmpeft_fast_cuda.*`: csrc/cuda/registration.cpp; they
return what is wrong instead of throwing it, and `cuda_op` raises.
"""

import functools
import importlib
from types import ModuleType

import torch

OPS = (
    "keep_bits", "prologue", "prologue_backward", "heads", "heads_backward", "merge_prefix", "prefix_backward",
    "cross_entropy", "activation", "unpack_4bit", "unpack_8bit",
)  # fmt: skip


def _nothing(*arguments) -> None:
    return None


_cuda_ops = torch.ops.mmpeft_fast_cuda
_FINE = ("", "")  # the sentences that follow every CUDA op's tensors: nothing was refused, nothing failed


def _fake_gemm(*arguments):
    return _FINE


def _fake_dy_pass(dy, a, u, num_outs, ranks, scaling, activation, need_da, need_du):
    return dy.new_empty(a.shape if need_da else 0), u.new_empty(u.shape if need_du else 0), *_FINE


def _fake_prologue(name, x, up, gain, eps, in_scale, rstd, down, activation, seed, p, stream, write_h):
    ranks = 0 if down is None else (x.shape[0], down.shape[0])
    rows = x.shape[0] if name == "rms_norm" and rstd is None else 0
    z = x.new_empty(ranks if activation != "identity" else 0)
    return x.new_empty(x.shape if write_h else 0), x.new_empty(rows, dtype=torch.float32), x.new_empty(ranks), z, *_FINE


def _fake_prologue_backward(
    name, dh, x, up, gain, in_scale, rstd, da, down, seed, p, stream, dresidual, dx, dup, need_dgain, need_din_scale
):
    return (
        dh.new_empty(0) if not need_dgain else torch.empty_like(gain),
        dh.new_empty(0) if not need_din_scale else torch.empty_like(in_scale),
        *_FINE,
    )


_CUDA_FAKES = {
    "lowrank_gemm_out": _fake_gemm,
    "dy_pass": _fake_dy_pass,
    "prologue": _fake_prologue,
    "prologue_backward": _fake_prologue_backward,
}


@functools.cache
def _register_fakes() -> None:
    """Once a process, however often the extension is looked for: an op takes one fake."""
    for name in OPS:
        torch.library.register_fake(f"mmpeft_fast_c::{name}", _nothing)
    if hasattr(torch.ops.mmpeft_fast_cuda, "lowrank_gemm_out"):
        for name, fake in _CUDA_FAKES.items():
            torch.library.register_fake(f"mmpeft_fast_cuda::{name}", fake)


@functools.cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    """The extension's module, or why there is none. Loading registers the ops."""
    try:
        module = importlib.import_module("mmpeft_fast._C")
    except ModuleNotFoundError:
        return None, "the native extension was not built; run: pip install --no-build-isolation -e ."
    except ImportError as error:  # a symbol of another torch, say
        return None, f"the native extension does not load ({str(error).splitlines()[0]}); build it again"
    if module.torch_version != torch.__version__:
        built = f"was built for torch {module.torch_version}, this is {torch.__version__}"
        return None, f"the native extension {built}; build it again"
    _register_fakes()
    return module, None


def extension() -> ModuleType:
    """The extension's module: `instruction_set()`, `instruction_sets()`, `use_instruction_set(name)`, `num_lanes()`,
    `torch_version`, `compiler`. Its ops are registered after this.

    The instruction set is the processor's best; a lower one changes the speed, and results by their rounding.

    Raises:
        RuntimeError: it is not there.
    """
    module, reason = _loaded()
    if module is None:
        raise RuntimeError(f"the cpu provider is not available: {reason}")
    return module


def cuda_op(name: str, *arguments) -> list:
    """What the op of `torch.ops.mmpeft_fast_cuda` returns besides its sentences.

    Raises:
        ValueError: it was given what it cannot take.
        RuntimeError: the launch failed.
    """
    *results, refused, failed = getattr(_cuda_ops, name)(*arguments)
    if refused:
        raise ValueError(refused)
    if failed:
        raise RuntimeError(failed)
    return results


def why_unavailable() -> str | None:
    """One line on why there is no extension; None where there is one."""
    return _loaded()[1]


def why_no_cuda() -> str | None:
    """One line on why the extension has no CUDA kernels; None where it has them."""
    if why_unavailable() is not None:
        return why_unavailable()
    if not hasattr(torch.ops.mmpeft_fast_cuda, "lowrank_gemm_out"):
        return "the native extension was built without CUDA; it needs nvcc and a CUDA build of torch"
    return None

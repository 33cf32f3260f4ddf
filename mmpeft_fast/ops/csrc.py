"""The native extension: whether it is there, why not, and fakes of its ops, `torch.ops.mmpeft_fast_c.*`.

Every op writes to tensors that the caller gives and returns nothing (csrc/cpu/ops.h says what each does), so a fake has
nothing to do.
"""

import functools
import importlib
import os
from types import ModuleType

import torch

OPS = (
    "keep_bits", "prologue", "prologue_backward", "heads", "heads_backward", "merge_prefix", "prefix_backward",
    "cross_entropy", "activation",
)  # fmt: skip


def _nothing(*arguments) -> None:
    return None


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
    for name in OPS:
        torch.library.register_fake(f"mmpeft_fast_c::{name}", _nothing)
    wanted = os.environ.get("MMPEFT_FAST_ISA")
    if wanted:
        module.use_instruction_set(wanted)
    return module, None


def extension() -> ModuleType:
    """The extension's module: `instruction_set()`, `instruction_sets()`, `use_instruction_set(name)`, `num_lanes()`,
    `torch_version`, `compiler`. Its ops are registered after this.

    The instruction set is the processor's best, or MMPEFT_FAST_ISA (default, avx2, avx512 or avx512_bf16): it changes
    the speed, and results by no more than their rounding.

    Raises:
        RuntimeError: it is not there.
        ValueError: MMPEFT_FAST_ISA names no instruction set of this processor.
    """
    module, reason = _loaded()
    if module is None:
        raise RuntimeError(f"the cpu provider is not available: {reason}")
    return module


def why_unavailable() -> str | None:
    """One line on why there is no extension; None where there is one."""
    return _loaded()[1]

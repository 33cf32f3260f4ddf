"""Unsloth and Liger themselves beside our steps: same models, batches, LoRA and optimizer, each in its own process.

Their wheels are looked for in a folder and unpacked, nothing is installed. `frozen`, HF PEFT and our fused step run on
the same text decoders (settings "text" of `shapes`), so that one run compares all of them.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from bench.gpu.shapes import Scope, Setting

# Implementation -> the packages that have to come as wheels or be installed. liger: HF PEFT with bf16 adapters on
# decoder classes that Liger has replaced; unsloth: its loader and kernels under autocast, float32 adapters.
NAMES = {"liger": ("liger_kernel",), "unsloth": ("unsloth", "unsloth_zoo", "trl", "cut_cross_entropy")}
OURS = ("triton", "frozen", "peft_bf16")
# Imported by the peers' trainers, not called in a step, and too large to carry.
_STAND_INS = {"datasets": "4.3.0", "pyarrow": "21.0.0", "pandas": "2.3.3", "bitsandbytes": "0.49.0"}
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def items(wheels: Path | None, scope: Scope) -> list[dict]:
    """Arguments of `run`."""
    target = {"dtype": scope.dtype, "device": scope.device, "wheels": None if wheels is None else str(wheels)}
    return [
        {"setting": setting, "implementation": name, **target}
        for setting in scope.text
        for name in ((*OURS, *NAMES) if wheels is not None and scope.few is None else NAMES)
    ]


def run(setting: str, implementation: str, dtype: str, device: str, wheels: str | None) -> Iterator[dict]:
    """Rows of `steps.run_step`, or one that says what is missing."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        if implementation in NAMES:
            missing = load(implementation, None if wheels is None else Path(wheels), Path(folder))
            if missing:
                yield {"implementation": implementation, "name": setting, "not_run": missing}
                return
        from bench.gpu import steps  # transformers: a peer wants to be imported before it

        yield from steps.run_step(setting, implementation, dtype, device, label=_version(implementation))


def _version(implementation: str) -> str | None:
    name = {"liger": "liger-kernel", "unsloth": "unsloth"}.get(implementation)
    return name and f"{name} {importlib.metadata.version(name)}"


def load(implementation: str, wheels: Path | None, folder: Path) -> str | None:
    """Makes a peer importable and lets it change the classes that it changes; what is missing, or None.

    Has to run before transformers' decoder classes are built.
    """
    if wheels is not None:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        # Behind what is installed: a wheel must not replace the torch or transformers of the run.
        sys.path.append(str(folder))
    absent = [name for name in NAMES[implementation] if importlib.util.find_spec(name) is None]
    if absent:
        return f"{', '.join(absent)}: no wheel in {wheels.name if wheels else '--wheels (not given)'}, not installed"
    if implementation == "liger":
        from liger_kernel import transformers as liger

        for replace in (liger.apply_liger_kernel_to_llama, liger.apply_liger_kernel_to_qwen2):
            replace(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=True)
        return None
    _stand_in(folder)
    importlib.import_module("unsloth")
    return None


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of `_STAND_INS` that are not there: modules in which every name is an empty class."""

    def __init__(self, names: list[str]):
        self._names = names

    def find_spec(self, name, path=None, target=None):
        is_ours = name.split(".")[0] in self._names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_ours else None

    def create_module(self, spec):
        def made(name: str):
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module = types.ModuleType(spec.name)
        module.__path__, module.__getattr__ = [], made
        module.__version__ = _STAND_INS[spec.name.split(".")[0]]
        return module

    def exec_module(self, module):
        pass


def _stand_in(folder: Path) -> None:
    """Stand-ins for what is neither installed nor among the wheels; their versions are read from metadata."""
    absent = [name for name in _STAND_INS if importlib.util.find_spec(name) is None]
    for name in absent:
        metadata = folder / f"{name}-{_STAND_INS[name]}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True, exist_ok=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {_STAND_INS[name]}\n")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    sys.meta_path.append(_StandIns(absent))


def unsloth_model(stock: nn.Module, setting: Setting) -> nn.Module:
    """`stock` as Unsloth loads and trains it: saved as a checkpoint, for that is what its loader takes."""
    import unsloth
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    dtype = next(stock.parameters()).dtype
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        stock.save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
        del stock
        torch.cuda.empty_cache()
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            folder, max_seq_length=setting.length, dtype=dtype, load_in_4bit=False
        )
    model.config.use_cache = False
    return unsloth.FastLanguageModel.get_peft_model(
        model, r=setting.r, lora_alpha=2 * setting.r, lora_dropout=setting.dropout, bias="none",
        target_modules=_TARGETS, use_gradient_checkpointing=False,
    )  # fmt: skip

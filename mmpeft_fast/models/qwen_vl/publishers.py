"""Models loaded through the publisher's own code: the same modules and tensors under other classes.

They keep their modules; `adopt` gives the four kinds that compute differently this package's classes in front of their
own, which `class_swap.restore_class` takes away again.
"""

import functools
import inspect
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

from mmpeft_fast.layers.class_swap import Swapped
from mmpeft_fast.models.qwen_vl.configuration import QwenVLConfig
from mmpeft_fast.models.qwen_vl.decoder import QwenVLRotaryEmbedding
from mmpeft_fast.models.qwen_vl.modeling import QwenVLForConditionalGeneration, QwenVLModel, stop_at_turn_ends

_PARTS = (
    "lm_head",
    "transformer.wte",
    "transformer.h",
    "transformer.ln_f",
    "transformer.rotary_emb",
    "transformer.visual",
)
_LAYER_PARTS = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.w1", "mlp.w2", "mlp.c_proj")


def is_publishers(model: nn.Module) -> bool:
    """Whether a model of another class has Qwen-VL's modules."""
    names = {name for name, _ in model.named_modules()}
    first = "transformer.h.0."
    return names.issuperset(_PARTS) and names.issuperset(first + part for part in _LAYER_PARTS)


@functools.cache
def _in_front(ours: type, theirs: type) -> type:
    namespace = {"_swapped_from": theirs, "_maker": (_in_front, (ours, theirs)), "__module__": theirs.__module__}
    if issubclass(ours, PreTrainedModel):
        # What transformers defines and the publisher overrides follows the conventions of its time; `generate` only
        # adds stop words to transformers' own.
        own = {name for kind in theirs.__mro__[: theirs.__mro__.index(PreTrainedModel)] for name in vars(kind)}
        namespace |= {
            name: inspect.getattr_static(ours, name)
            for name in own - {"generate"}
            if not name.startswith("__") and hasattr(ours, name)
        }
    return type(theirs.__name__, (Swapped, ours, theirs), namespace)


def _stored(folder: str, names: list[str]) -> dict[str, torch.Tensor] | None:
    """Those tensors of a checkpoint that is on this machine, or None."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = cached_file(
            folder, f"{stem}.index.json", local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
        if index is not None:
            files = json.loads(Path(index).read_text())["weight_map"]
        else:
            files = dict.fromkeys(names, stem)
        if not files.keys() >= set(names):
            continue
        found = {}
        for file in {files[name] for name in names}:
            path = cached_file(folder, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
            if path is None:
                break
            mine = [name for name in names if files[name] == file]
            if stem.endswith(".bin"):
                tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                found |= {name: tensors[name] for name in mine if name in tensors}
            else:
                with safe_open(path, framework="pt") as tensors:
                    found |= {name: tensors.get_tensor(name) for name in mine if name in tensors.keys()}  # noqa: SIM118
        if len(found) == len(names):
            return found
    return None


def _is_loaded(model: nn.Module) -> bool:
    """Whether the attention's output weights are the checkpoint's that the configuration names."""
    weights = {
        f"transformer.h.{i}.attn.c_proj.weight": getattr(layer.attn.c_proj, "base_layer", layer.attn.c_proj).weight
        for i, layer in enumerate(model.transformer.h)
    }
    stored = _stored(model.config.name_or_path, list(weights)) if model.config.name_or_path else None
    return stored is not None and all(
        torch.equal(weight.detach().cpu(), stored[name].to(weight.dtype)) for name, weight in weights.items()
    )


def _check_loaded(model: nn.Module) -> None:
    """transformers from 5 on runs the publisher's `_init_weights` on every attention after loading, since a buffer of
    it is in no checkpoint: its `c_proj` is then drawn anew. Models that are all on meta have nothing to lose."""
    if model.lm_head.weight.is_meta:
        return
    frequencies = getattr(model.transformer.rotary_emb, "inv_freq", None)
    is_suspect = bool(model.config.name_or_path) or (torch.is_tensor(frequencies) and frequencies.is_meta)
    if is_suspect and not _is_loaded(model):
        raise ValueError(
            f"fuse: expected {type(model).__name__} with the weights of its checkpoint, got attn.c_proj.weight that is "
            "not known to be from it (transformers draws it anew when it loads the publisher's code); load the "
            "checkpoint with QwenVLForConditionalGeneration.from_pretrained"
        )


def adopt(model: nn.Module) -> None:
    """Gives a model of the publisher's classes this package's computation, in place.

    Raises:
        ValueError: settings that this package's model does not have, activation checkpointing switched on before, or
            weights that are not known to be the checkpoint's.
    """
    _check_loaded(model)
    QwenVLConfig(**model.config.to_dict())
    if getattr(model.transformer, "gradient_checkpointing", False):
        raise ValueError("fuse: the publisher's activation checkpointing is on; expected it to be enabled after fuse")
    parts = [
        (model, QwenVLForConditionalGeneration),
        (model.transformer, QwenVLModel),
        (model.transformer.rotary_emb, QwenVLRotaryEmbedding),
        *((layer, GradientCheckpointingLayer) for layer in model.transformer.h),
    ]
    for module, ours in parts:
        module.__class__ = _in_front(ours, type(module))
    if getattr(model, "generation_config", None) is None:  # transformers makes one only for classes that can generate
        model.generation_config = GenerationConfig.from_model_config(model.config)
    stop_at_turn_ends(model.generation_config)

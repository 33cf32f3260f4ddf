"""Models loaded through the publisher's own code: the same modules and tensors under other classes.

They keep their modules; `adopt` gives the four kinds that compute differently this package's classes in front of their
own, which `class_swap.restore_class` takes away again.
"""

import functools

from torch import nn
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpeft_fast.layers.class_swap import Swapped
from mmpeft_fast.models.qwen_vl.configuration import QwenVLConfig
from mmpeft_fast.models.qwen_vl.decoder import QwenVLRotaryEmbedding
from mmpeft_fast.models.qwen_vl.modeling import QwenVLForConditionalGeneration, QwenVLModel

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
    return type(theirs.__name__, (Swapped, ours, theirs), namespace)


def adopt(model: nn.Module) -> None:
    """Gives a model of the publisher's classes this package's computation, in place.

    Raises:
        ValueError: settings that this package's model does not have, or activation checkpointing switched on before.
    """
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

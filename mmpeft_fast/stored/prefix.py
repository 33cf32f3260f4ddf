"""Prefix-tuning as HF PEFT stores it: materialised, and the weights of its projection besides, which HF PEFT leaves
unread."""

import torch
from peft import PrefixTuningConfig, TaskType
from torch import nn

from mmpeft_fast.methods import Prefix
from mmpeft_fast.models import Family
from mmpeft_fast.stored.form import DESCRIPTION, Form, Slot

PROMPT_KEY, ENCODER_ROOT = "prompt_embeddings", "prompt_encoder."


class PrefixForm(Form):
    method, config = Prefix, PrefixTuningConfig
    read = (
        DESCRIPTION
        | {"num_virtual_tokens": int, "prefix_projection": bool, "encoder_hidden_size": int | None}
        | {"init_weights": object}
        | dict.fromkeys(("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"), int | None)
    )
    finds_targets = False
    root = "base_model."  # no tuner lies between a PeftModel and its model

    def to_config(self, method, placement, model, family):
        return PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=method.num_virtual_tokens,
            prefix_projection=method.projection,
            encoder_hidden_size=method.projection_width or family.decoder_of(model).config.hidden_size,
            **_shape(family, model),
        )

    def to_method(self, config, targets, parts, model, family):
        for name, expected in _shape(family, model).items():
            if getattr(config, name) not in (None, expected):
                raise ValueError(f"prefix-tuning: expected {name}={expected}, got {getattr(config, name)}")
        return Prefix(
            num_virtual_tokens=config.num_virtual_tokens,
            projection=config.prefix_projection,
            projection_width=config.encoder_hidden_size if config.prefix_projection else None,
        )

    def runs_in_hf_peft(self, method, model, family):
        """HF PEFT 0.21 lengthens the attention mask by the prefix, and transformers computes multimodal rotary
        positions from mask and tokens of one length."""
        config = family.decoder_of(model).config
        return "mrope_section" not in (getattr(config, "rope_parameters", None) or {})

    def slots(self, method, model, family):
        place, encoder = f"{family.decoder}.prefix_encoder.", family.decoder_of(model).prefix_encoder
        if not method.projection:
            return {PROMPT_KEY: Slot.of(f"{place}embedding.weight", encoder.embedding.weight)}
        return {ENCODER_ROOT + name: Slot.of(place + name, tensor) for name, tensor in encoder.named_parameters()}

    def derived(self, method, model, family):
        with torch.no_grad():
            return {PROMPT_KEY: family.decoder_of(model).prefix_encoder()} if method.projection else {}

    def completed(self, method, metadata, keys):
        if method.projection and not any(key.startswith(ENCODER_ROOT) for key in keys):
            return Prefix(num_virtual_tokens=method.num_virtual_tokens)  # as HF PEFT keeps it: materialised
        return method


def _shape(family: Family, model: nn.Module) -> dict[str, int]:
    """The prefix's shape a layer, under HF PEFT's names."""
    config = family.decoder_of(model).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_key_value_heads,
        "token_dim": config.num_key_value_heads * head_dim,
    }

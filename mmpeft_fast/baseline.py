"""What fused models are measured against, `peft` in every table: HF PEFT where it has a method, else eager modules."""

import peft
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch import nn

from mmpeft_fast.methods import IA3, LayerNorm, LoRA, Method, Prefix
from mmpeft_fast.models import Family, family_of
from mmpeft_fast.peft_model import add_peft, part_modules

__all__ = ["add_baseline", "hf_config"]


def add_baseline(model: nn.Module, method: Method, *, train_connector: bool = False) -> tuple[nn.Module, str]:
    """Sets `model` up for `method` the way a stock stack does.

    Args:
        model: a transformers model of a known family; changed in place.
        method: any method of `mmpeft_fast.methods`.
        train_connector: also trains the connector.

    Returns:
        The model to train (a `PeftModel` or the model itself) and what it is, such as "HF PEFT 0.21.2".
    """
    family = family_of(model)
    config = hf_config(model, method, train_connector=train_connector)
    if config is None:
        return add_peft(model, method, train_connector=train_connector), "eager module"
    connector = family.modules_at(model, family.connector)
    wrapped = get_peft_model(model, config)
    if train_connector and isinstance(config, PrefixTuningConfig):  # prompt learning has no modules_to_save
        for module in connector:
            module.requires_grad_(True)
    return wrapped, f"HF PEFT {peft.__version__}"


def _site_pattern(family: Family, roles) -> str:
    names = "|".join(family.paths.roles[role].replace(".", r"\.") for role in roles)
    return rf"{_decoder_pattern(family)}\.{family.paths.layers}\.\d+\.({names})"


def _decoder_pattern(family: Family) -> str:
    return rf"(.*\.)?{family.decoder.rsplit('.', 1)[-1]}"


def hf_config(model: nn.Module, method: Method, *, train_connector: bool = False) -> PeftConfig | None:
    """HF PEFT's configuration of a method for this model, or None where HF PEFT does not have it.

    Prefix-tuning of models with multimodal rotary positions is None too: HF PEFT 0.21 lengthens the attention mask by
    the prefix, and transformers computes those positions from mask and tokens of one length.
    """
    family = family_of(model)
    plan = method.plan(family.paths.roles)
    parts = set(plan.parts) | ({"connector"} if train_connector else set())
    kept = part_modules(model, family, parts)
    modules_to_save = [name for name, module in model.named_modules() if any(module is part for part in kept)] or None
    if isinstance(method, LoRA):
        return LoraConfig(
            r=method.r,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            use_rslora=method.rank_stabilized,
            target_modules=_site_pattern(family, plan.branches),
            modules_to_save=modules_to_save,
        )
    if isinstance(method, IA3):
        inputs = [role for role, where in plan.scales.items() if where == "input"]
        return IA3Config(
            target_modules=_site_pattern(family, plan.scales),
            feedforward_modules=_site_pattern(family, inputs) if inputs else [],
            modules_to_save=modules_to_save,
        )
    if isinstance(method, LayerNorm):
        roles = [role for role in plan.gains if role != "final_norm"]
        pattern = _site_pattern(family, roles)
        if "final_norm" in plan.gains:
            pattern += rf"|{_decoder_pattern(family)}\.{family.paths.norm}"
        return LNTuningConfig(target_modules=pattern, modules_to_save=modules_to_save)
    config = family.decoder_of(model).config
    if isinstance(method, Prefix) and "mrope_section" not in (getattr(config, "rope_parameters", None) or {}):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=method.num_virtual_tokens,
            prefix_projection=method.projection,
            encoder_hidden_size=method.projection_width or config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_attention_heads=config.num_key_value_heads,
            token_dim=config.num_key_value_heads * head_dim,
        )
    return None

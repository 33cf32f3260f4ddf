"""LoRA as HF PEFT stores it, and LoRA-FA, which to HF PEFT is a LoRA: a mark in the tensor file tells them apart."""

from peft import LoraConfig

from mmpeft_fast.fields import shown
from mmpeft_fast.methods import LoRA, LoRAFA
from mmpeft_fast.stored.form import DESCRIPTION, OTHERWISE, TARGETING, Form, site_pattern

_INDEPENDENT_MASKS, _FROZEN_DOWN = "independent_masks", "frozen_down"
_BASE_KEEPING_INITS = (True, False, "gaussian", "orthogonal")  # PiSSA and its kin change the base weights as well


class LoRAForm(Form):
    method, config = LoRA, LoraConfig
    read = (
        DESCRIPTION
        | TARGETING
        | {"r": int, "lora_alpha": float, "lora_dropout": float, "use_rslora": bool}
        | {"init_lora_weights": bool | str, "runtime_config": object, "use_dora": bool}
    )
    down, up = "lora_A", "lora_B"

    def reads(self, config):
        return type(config) is LoraConfig and not config.use_dora

    def to_config(self, method, placement, model, family):
        return LoraConfig(
            r=method.r,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            use_rslora=method.rank_stabilized,
            target_modules=site_pattern(family, placement.branches, method, model),
        )

    def to_method(self, config, targets, parts, model, family):
        if config.init_lora_weights not in _BASE_KEEPING_INITS:
            init = shown(config.init_lora_weights)
            raise ValueError(f"LoraConfig: init_lora_weights={init} changes the base weights; {OTHERWISE}")
        return self.method(
            r=config.r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=targets.roles,
            rank_stabilized=config.use_rslora,
            layers=targets.layers,
        )

    def metadata(self, method):
        return {_INDEPENDENT_MASKS: "true"} if method.independent_masks else {}

    def completed(self, method, metadata, keys):
        kind = LoRAFA if metadata.get(_FROZEN_DOWN) == "true" else type(method)
        return kind(**vars(method) | {_INDEPENDENT_MASKS: metadata.get(_INDEPENDENT_MASKS) == "true"})


class LoRAFAForm(LoRAForm):
    method = LoRAFA

    def reads(self, config):
        return False

    def metadata(self, method):
        return super().metadata(method) | {_FROZEN_DOWN: "true"}

    def settle(self, method, wrapped):
        for name, parameter in wrapped.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)

"""LayerNorm-tuning as HF PEFT's LN-tuning stores it."""

from peft import LNTuningConfig

from mmpeft_fast.methods import LayerNorm
from mmpeft_fast.stored.form import DESCRIPTION, OTHERWISE, TARGETING, Form, decoder_pattern, site_pattern


class LayerNormForm(Form):
    method, config = LayerNorm, LNTuningConfig
    read = DESCRIPTION | TARGETING

    def to_config(self, method, placement, model, family):
        pattern = site_pattern(family, [role for role in placement.gains if role != "final_norm"], method, model)
        if "final_norm" in placement.gains:
            pattern += rf"|{decoder_pattern(family)}\.{family.paths.norm}"
        return LNTuningConfig(target_modules=pattern)

    def to_method(self, config, targets, parts, model, family):
        roles = targets.roles
        if {"input_norm", "post_attention_norm"} != {*roles} - {"final_norm"}:
            raise ValueError(
                f"LN-tuning: expected both norms of every layer as targets, got {list(roles)}; {OTHERWISE}"
            )
        return LayerNorm(final="final_norm" in roles, layers=targets.layers)

    def take_parts(self, method, parts):
        return LayerNorm(final=method.final, layers=method.layers, **dict.fromkeys(parts, True)), ()

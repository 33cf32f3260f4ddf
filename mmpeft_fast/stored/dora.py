"""DoRA as HF PEFT stores it: a LoRA with `use_dora` and a vector beside each pair."""

from mmpeft_fast.methods import DoRA
from mmpeft_fast.stored.lora import LoRAForm


class DoRAForm(LoRAForm):
    method = DoRA

    def reads(self, config):
        return type(config) is self.config and config.use_dora

    def to_config(self, method, placement, model, family):
        config = super().to_config(method, placement, model, family)
        config.use_dora = True
        return config

    def runs_in_hf_peft(self, method, model, family):
        """With dropout HF PEFT runs the base weight on the dropped input as well."""
        return method.dropout == 0

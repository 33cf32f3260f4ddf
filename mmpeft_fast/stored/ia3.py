"""IA3 as HF PEFT stores it."""

from peft import IA3Config

from mmpeft_fast.methods import IA3
from mmpeft_fast.stored.form import DESCRIPTION, NAMES, OTHERWISE, TARGETING, Form, site_pattern


class IA3Form(Form):
    method, config = IA3, IA3Config
    read = DESCRIPTION | TARGETING | {"feedforward_modules": NAMES, "init_ia3_weights": bool}

    def to_config(self, method, placement, model, family):
        inputs = [role for role, where in placement.scales.items() if where == "input"]
        return IA3Config(
            target_modules=site_pattern(family, placement.scales, method, model),
            feedforward_modules=site_pattern(family, inputs, method, model) if inputs else [],
        )

    def to_method(self, config, targets, parts, model, family):
        method = IA3(targets=targets.roles, layers=targets.layers)
        for role, where in method.place(family.paths.roles).scales.items():
            for name, site in targets.sites.items():
                if name.endswith(f".{family.paths.roles[role]}") and site.is_feedforward != (where == "input"):
                    got = "input" if site.is_feedforward else "output"
                    raise ValueError(f"IA3: expected the {where} of {name} scaled, got its {got}; {OTHERWISE}")
        return method

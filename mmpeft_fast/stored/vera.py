"""VeRA as HF PEFT stores it: the vectors of each layer, and the one pair of matrices for all of them."""

from peft import VeraConfig

from mmpeft_fast.methods import VeRA
from mmpeft_fast.stored.form import DESCRIPTION, TARGETING, Form, site_pattern

_VECTORS = {"inner": "vera_lambda_d", "outer": "vera_lambda_b"}
_PROJECTIONS = {"down": "base_model.vera_A", "up": "base_model.vera_B"}


class VeRAForm(Form):
    method, config = VeRA, VeraConfig
    read = (
        DESCRIPTION
        | TARGETING
        | {"r": int, "vera_dropout": float, "d_initial": float, "projection_prng_key": int, "init_weights": bool}
    )

    def to_config(self, method, placement, model, family):
        return VeraConfig(
            r=method.r,
            vera_dropout=method.dropout,
            d_initial=method.d_initial,
            projection_prng_key=method.projection_seed,
            target_modules=site_pattern(family, placement.branches, method, model),
        )

    def to_method(self, config, targets, parts, model, family):
        return VeRA(
            r=config.r,
            dropout=config.vera_dropout,
            d_initial=config.d_initial,
            projection_seed=config.projection_prng_key,
            targets=targets.roles,
            layers=targets.layers,
        )

    def slots(self, method, model, family):
        found = {}
        for slot in super().slots(method, model, family).values():
            site, _, short = slot.name.partition(".branches.0.")
            if short in _PROJECTIONS:  # a parameter of the first target is that of all
                found.setdefault(_PROJECTIONS[short], slot)
            else:
                found[f"{self.root}{site}.{_VECTORS[short]}"] = slot
        return found

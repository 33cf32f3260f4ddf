"""Every other method: its class by name and its settings, in a folder of the same shape."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from mmpeft_fast.methods import Method, method_class
from mmpeft_fast.stored.form import ATTACHED, DESCRIPTION, Form, Slot, tupled


@dataclass
class MethodConfig(PeftConfig):
    """A method's class, its settings as JSON has them, and the trained modules beside it by name."""

    method: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "MMPEFT_METHOD"


class OwnForm(Form):
    method, config = Method, MethodConfig
    read = DESCRIPTION | {"method": str, "settings": dict}
    finds_targets = False

    def to_config(self, method, placement, model, family):
        settings = {each.name: getattr(method, each.name) for each in dataclasses.fields(method)}
        try:
            stored = json.loads(json.dumps(settings))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{type(method).__name__}: expected settings that JSON has, to store them; {error}"
            ) from error
        return MethodConfig(method=type(method).__name__, settings=stored)

    def to_method(self, config, targets, parts, model, family):
        kind = method_class(config.method)
        unknown = sorted(config.settings.keys() - {each.name for each in dataclasses.fields(kind)})
        if unknown:
            raise ValueError(f"{config.method}: has no setting {unknown[0]!r}")
        return kind(**{name: tupled(value) for name, value in config.settings.items()})

    def runs_in_hf_peft(self, method, model, family):
        return False

    def slots(self, method, model, family):
        found = super().slots(method, model, family)
        for attached in ATTACHED:
            module = getattr(family.decoder_of(model), attached, None)
            for name, tensor in () if module is None else module.named_parameters():
                place = f"{family.decoder}.{attached}.{name}"
                found[self.root + place] = Slot.of(place, tensor)
        # A tensor that several layers share is stored once, where it comes first.
        firsts: dict[int, str] = {}
        return {key: slot for key, slot in found.items() if firsts.setdefault(id(slot.tensor), key) == key}

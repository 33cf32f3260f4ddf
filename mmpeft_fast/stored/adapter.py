"""The bottleneck Adapter, which HF PEFT does not have, in a folder of the same shape."""

import dataclasses
from dataclasses import dataclass

from peft import PeftConfig

from mmpeft_fast.methods import Adapter
from mmpeft_fast.stored.form import DESCRIPTION, Form, listed, tupled


@dataclass
class AdapterConfig(PeftConfig):
    """The settings of `methods.Adapter` (targets as roles), and the trained modules beside it by name."""

    bottleneck: int = 256
    activation: str = "tanh"
    dropout: float = 0.05
    scaling: float = 1.0
    targets: list[str] | None = None
    placement: str = "series"
    init: str = "bert"
    layers: list[int | str] | int | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = "MMPEFT_ADAPTER"


class AdapterForm(Form):
    method, config = Adapter, AdapterConfig
    read = (
        DESCRIPTION
        | {"bottleneck": int, "activation": str, "dropout": float, "scaling": float}
        | {"targets": list[str] | None, "placement": str, "init": str, "layers": list[int | str] | int | str | None}
    )
    finds_targets = False
    down, up = "adapter_down", "adapter_up"

    def to_config(self, method, placement, model, family):
        return AdapterConfig(
            **dataclasses.asdict(method) | {"targets": list(placement.branches), "layers": listed(method.layers)}
        )

    def to_method(self, config, targets, parts, model, family):
        names = {field.name for field in dataclasses.fields(Adapter)}
        settings = {name: value for name, value in vars(config).items() if name in names}
        return Adapter(**settings | {"targets": tuple(config.targets or ()), "layers": tupled(config.layers)})

    def runs_in_hf_peft(self, method, model, family):
        return False

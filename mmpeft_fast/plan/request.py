"""What is planned: one training step of a model, method, implementation and batch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from mmpeft_fast.methods import make_method
from mmpeft_fast.models import FAMILIES

IMPLEMENTATIONS = ("frozen", "peft", "fused")
TRAINABLE_PARTS = ("connector", "embeddings", "head")
OPTIMIZERS = ("foreach", "fused")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One step to plan.

    Attributes:
        model: a size that a family offers, or a folder (or file) with a configuration that transformers can build.
        method: name in `METHODS`; settings: its settings that differ from the study's for the model.
        implementation: frozen (forward and the gradient of the input embeddings), peft (`baseline`) or fused.
        batch_size, seq_len: samples, and tokens a sample with those of its images; without padding.
        images: images a sample; None is one, or none where the model reads text alone.
        image_size: pixels a side, where the family takes any.
        supervised_fraction: share of the tokens that carry a label.
        dtype: of the base model. checkpointing: activation checkpointing of the decoder's layers.
        train: parts of the base model that are trained too, of TRAINABLE_PARTS.
        fp32_adapters: added parameters are float32, else in `dtype`.
        optimizer: AdamW as torch chooses on a GPU, a pass for each operation ("foreach"), or in one ("fused").
    """

    model: str
    method: str = "lora"
    settings: Mapping[str, object] = field(default_factory=dict)
    implementation: str = "fused"
    batch_size: int = 1
    seq_len: int = 1024
    images: int | None = None
    image_size: int | None = None
    supervised_fraction: float = 0.05
    dtype: str = "bf16"
    checkpointing: bool = False
    train: tuple[str, ...] = ()
    fp32_adapters: bool = True
    optimizer: str = "foreach"

    def __post_init__(self):
        if self.images is None:
            object.__setattr__(self, "images", _usual_images(self.model))
        for name, low in (("batch_size", 1), ("seq_len", 2), ("images", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}: expected an integer of at least {low}, got {value!r}")
        if not 0 < self.supervised_fraction <= 1:
            raise ValueError(f"supervised_fraction: expected a number in (0, 1], got {self.supervised_fraction!r}")
        for name, allowed in (("implementation", IMPLEMENTATIONS), ("dtype", tuple(DTYPES)), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {list(allowed)}, got {getattr(self, name)!r}")
        unknown = sorted(set(self.train) - set(TRAINABLE_PARTS))
        if unknown:
            raise ValueError(f"train: expected parts among {list(TRAINABLE_PARTS)}, got {unknown}")
        make_method(self.method, **self.settings)

    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            ValueError: no such size, and no readable configuration of a known family there.
        """
        return model_config(self.model)


def _usual_images(model: str) -> int:
    try:
        model_type = model_config(model).model_type
    except ValueError:
        return 1  # what is wrong with the model is said where it is read
    return next(family.usual_images for family in FAMILIES.values() if model_type in family.model_types)


def model_config(model: str) -> PretrainedConfig:
    """The configuration of a size by name, or of a local folder or file."""
    sizes = {size: build for family in FAMILIES.values() for size, build in family.sizes.items()}
    if model in sizes:
        return sizes[model]()
    if not os.path.exists(model):
        raise ValueError(f"model: expected one of {sorted(sizes)} or a local configuration, got {model!r}")
    try:
        model_type = PretrainedConfig.get_config_dict(model, local_files_only=True)[0].get("model_type")
        for family in FAMILIES.values():
            if model_type in family.model_types:
                return family.model_class.config_class.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model: transformers cannot build the configuration in {model!r}: {reason}") from error
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(f"model: expected a configuration of type {known}, got {model_type!r} in {model!r}")

"""Model families. A new family is one file and one line in `FAMILIES`, or outside of this package one call of
`register_family`."""

import itertools
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mmpeft_fast.layers import known
from mmpeft_fast.layers.causal_lm import called_parts
from mmpeft_fast.layers.class_swap import own_class
from mmpeft_fast.models.checks import check_config
from mmpeft_fast.models.family import Family
from mmpeft_fast.models.internvl import INTERNVL
from mmpeft_fast.models.llama import LLAMA
from mmpeft_fast.models.llava import LLAVA
from mmpeft_fast.models.llava_next import LLAVA_NEXT
from mmpeft_fast.models.llava_onevision import LLAVA_ONEVISION
from mmpeft_fast.models.mistral import MISTRAL
from mmpeft_fast.models.qwen2 import QWEN2
from mmpeft_fast.models.qwen2_5_vl import QWEN2_5_VL
from mmpeft_fast.models.qwen2_vl import QWEN2_VL
from mmpeft_fast.models.qwen3 import QWEN3
from mmpeft_fast.models.qwen3_vl import QWEN3_VL
from mmpeft_fast.models.qwen_vl import QWEN_VL

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(LLAVA, LLAVA_NEXT, LLAVA_ONEVISION, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN_VL, INTERNVL),
        *(LLAMA, MISTRAL, QWEN2, QWEN3),  # text alone
    )
}

# What transformers and the readers below it raise for damaged files and for values that mean nothing.
UNLOADABLE = (
    *(ImportError, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(AssertionError, StrictDataclassError, SafetensorError),
)

__all__ = [
    "FAMILIES",
    "UNLOADABLE",
    "Family",
    "base_model",
    "check_config",
    "empty_model",
    "family_for",
    "family_of",
    "load_pretrained",
    "register_family",
    "tiny_model",
    "tiny_names",
    "tiny_processor",
]


def tiny_names() -> dict[str, str]:
    """The families by the names of the models that are built on the spot, such as "tiny-qwen2-vl"."""
    return {f"tiny-{name.replace('_', '-')}": name for name in FAMILIES}


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a wrapper that offers `get_base_model` (HF PEFT), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def register_family(family: Family) -> None:
    """Makes a family known by its name and model types to everything that takes one.

    The family answers for its own classes: the forwards of its model classes, and of decoder classes that transformers
    does not ship, are taken as known as they stand now. `fuse(model, verify=True)` compares what that gives with the
    unfused model.

    Raises:
        ValueError: its name or one of its model types is another family's already.
    """
    others = [other for name, other in FAMILIES.items() if name != family.name]
    if family.name in FAMILIES and FAMILIES[family.name].model_class.__qualname__ != family.model_class.__qualname__:
        raise ValueError(f"register_family: there is a family {family.name!r} already")
    taken = {model_type: other.name for other in others for model_type in other.model_types}
    for model_type in family.model_types:
        if model_type in taken:
            raise ValueError(f"register_family: model type {model_type!r} is of family {taken[model_type]!r} already")
    FAMILIES[family.name] = family
    ids = itertools.count()
    model = empty_model(family.tiny_config(512, lambda token: next(ids)), dtype=torch.float32)
    decoder = family.decoder_of(model)
    for module, role in [(model, "causal_lm"), *called_parts(model, decoder)]:
        known.accept(type(module), role)
    family.vouch(model, unless_shipped=True)


def family_for(model_type: str, what: str) -> Family:
    """The family of a configuration's model type. Raises ValueError, about `what`, where there is none."""
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    raise ValueError(f"{what} has model type {model_type!r}; expected one of {known}")


def family_of(model: nn.Module) -> Family:
    """The family a model belongs to.

    Raises:
        ValueError: unknown model type, or not the class with its language head.
    """
    model = base_model(model)
    config = getattr(model, "config", None)
    family = family_for(getattr(config, "model_type", type(model).__name__), type(model).__name__)
    if not isinstance(model, family.model_class) and not family.is_publishers(model):
        raise ValueError(f"expected a {family.model_class.__name__}, got {type(model).__name__}")
    if not issubclass(own_class(model), family.model_class):
        family.vouch(model)
    return family


def load_pretrained(name_or_path: str, *, dtype: torch.dtype) -> tuple[PreTrainedModel, object]:
    """A real checkpoint and its processor (of text alone: its tokenizer), by local folder or hub name, with SDPA
    attention.

    Raises:
        ValueError: no such model, or not of a known family.
    """
    try:
        config, _ = PretrainedConfig.get_config_dict(name_or_path)
        family = family_for(config["model_type"], f"model {name_or_path!r}")
        check_config(family.model_class.config_class.from_pretrained(name_or_path))
        model = family.model_class.from_pretrained(name_or_path, dtype=dtype, attn_implementation="sdpa")
        family.layers_of(model)
        processor = family.processor_class.from_pretrained(name_or_path)
    except UNLOADABLE as error:
        kind = "folder" if Path(name_or_path).is_dir() else "model name"
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot load a model and its processor from {kind} {name_or_path!r}: {reason}") from error
    return model, processor


def empty_model(config: PretrainedConfig, *, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model on the meta device: shapes and dtypes without memory, for counting."""
    family = family_for(config.model_type, "configuration")
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            config._attn_implementation = "sdpa"
            return family.model_class(config)
    finally:
        torch.set_default_dtype(default)


def tiny_model(family_name: str, tokenizer, *, seed: int) -> PreTrainedModel:
    """A randomly initialised model of a few million parameters for `tokenizer`, the same for the same seed."""
    if family_name not in FAMILIES:
        raise ValueError(f"unknown model family {family_name!r}; expected one of {sorted(FAMILIES)}")
    family = FAMILIES[family_name]
    missing = [token for token in family.special_tokens if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"the tokenizer lacks special tokens {missing} of family {family_name!r}")
    config = family.tiny_config(len(tokenizer), tokenizer.convert_tokens_to_ids)
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.model_class(config)


def tiny_processor(family_name: str, tokenizer):
    """The real processor class of a family around `tokenizer`, for the image size of `tiny_model`."""
    if family_name not in FAMILIES:
        raise ValueError(f"unknown model family {family_name!r}; expected one of {sorted(FAMILIES)}")
    return FAMILIES[family_name].tiny_processor(tokenizer)

"""What fused models are measured against, `peft` in every table: HF PEFT where it has a method, else eager modules."""

import peft
from peft import get_peft_model
from torch import nn

from mmpeft_fast.hf_config import hf_config
from mmpeft_fast.methods import Adapter, Method, Prefix
from mmpeft_fast.models import family_of
from mmpeft_fast.peft_model import add_peft

__all__ = ["add_baseline"]


def add_baseline(model: nn.Module, method: Method, *, train_connector: bool = False) -> tuple[nn.Module, str]:
    """Sets `model` up for `method` the way a stock stack does.

    Args:
        model: a transformers model of a known family; changed in place.
        method: any method of `mmpeft_fast.methods`.
        train_connector: also trains the connector.

    Returns:
        The model to train (a `PeftModel` or the model itself) and what it is, such as "HF PEFT 0.21.2".
    """
    if train_connector:
        family_of(model).require_connector()
    if not _hf_peft_runs(model, method):
        return add_peft(model, method, train_connector=train_connector), "eager module"
    config = hf_config(model, method, parts=("connector",) if train_connector else ())
    return get_peft_model(model, config), f"HF PEFT {peft.__version__}"


def _hf_peft_runs(model: nn.Module, method: Method) -> bool:
    """Whether HF PEFT has the method, and its form of it runs on this model.

    Prefix-tuning of models with multimodal rotary positions does not: HF PEFT 0.21 lengthens the attention mask by the
    prefix, and transformers computes those positions from mask and tokens of one length.
    """
    if isinstance(method, Prefix):
        config = family_of(model).decoder_of(model).config
        return "mrope_section" not in (getattr(config, "rope_parameters", None) or {})
    return not isinstance(method, Adapter)

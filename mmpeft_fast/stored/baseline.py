"""What fused models are measured against, `peft` in every table: HF PEFT where it has a method, else eager modules."""

import peft
from peft import get_peft_model
from torch import nn

from mmpeft_fast.methods import Method
from mmpeft_fast.models import family_of
from mmpeft_fast.peft_model import add_peft, check_trainable
from mmpeft_fast.stored.forms import form_of
from mmpeft_fast.stored.hf_config import hf_config

__all__ = ["add_baseline"]


def add_baseline(model: nn.Module, method: Method, *, train_connector: bool = False) -> tuple[nn.Module, str]:
    """Sets `model` up for `method` the way a stock stack does.

    Args:
        model: a transformers model of a known family; changed in place.
        method: any method; one that HF PEFT does not have, or a subclass of one that it has, runs as eager modules.
        train_connector: also trains the connector.

    Returns:
        The model to train (a `PeftModel` or the model itself) and what it is, such as "HF PEFT 0.21.2".
    """
    family = family_of(model)
    if train_connector:
        family.require_connector()
    if not form_of(method).runs_in_hf_peft(method, model, family):
        return add_peft(model, method, train_connector=train_connector), "eager module"
    parts = method.place(family.paths.roles).parts
    check_trainable(model, family, set(parts) | ({"connector"} if train_connector else set()))
    config = hf_config(model, method, parts=("connector",) if train_connector else ())
    wrapped = get_peft_model(model, config)
    form_of(method).settle(method, wrapped)
    return wrapped, f"HF PEFT {peft.__version__}"

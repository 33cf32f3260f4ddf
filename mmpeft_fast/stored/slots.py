"""What `add_peft` has put on a model: the method, the parts trained beside it, and every tensor under the key that HF
PEFT stores it by."""

from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.layers.peft_norm import WideGain
from mmpeft_fast.methods import Method
from mmpeft_fast.models import Family, base_model, family_of
from mmpeft_fast.peft_model import unfuse
from mmpeft_fast.placement import PARTS
from mmpeft_fast.stored.form import ATTACHED, Slot
from mmpeft_fast.stored.forms import form_of
from mmpeft_fast.stored.hf_config import meta_twin, part_names, part_parameters, parts_with


class Carried(NamedTuple):
    """A method, the parts (`placement.PARTS`) trained besides its own, and all their tensors by stored key."""

    method: Method
    parts: tuple[str, ...]
    slots: dict[str, Slot]


def read_carried(model: nn.Module) -> Carried | None:
    """What a model is set up to train, or None where it is a plain model.

    Args:
        model: a transformers model of a known family, fused or not.

    Raises:
        ValueError: another kind of model, or trained parameters that belong neither to the method nor to a part.
    """
    if base_model(model) is not model:
        raise ValueError(f"expected a transformers model, got a {type(model).__name__}")
    family, method = family_of(model), getattr(model, "peft_method", None)
    if method is None:
        return None
    form = form_of(method)
    slots = form.slots(method, model, family)
    tensors = {id(slot.tensor) for slot in slots.values()}  # a shared one has several names and one slot
    own = {name for name, tensor in model.named_parameters(remove_duplicate=False) if id(tensor) in tensors}
    parts = _parts_on(model, family, _tuned_names(model) - own, method)
    for module_name in part_names(model, family, parts):
        for name, tensor in model.get_submodule(module_name).state_dict(keep_vars=True).items():
            full = f"{module_name}.{name}"
            slots[form.root + full] = Slot(full, tensor, tuple(tensor.shape))
    return Carried(*form.take_parts(method, parts), slots)


def mark_loaded(model: nn.Module, names: Collection[str]) -> None:
    """Remembers parameters whose values came from an adapter, so that they count as its own while they are frozen."""
    model.loaded_from_adapter = frozenset(names)


def bare_twin(model: nn.Module) -> nn.Module:
    """A copy on the meta device, not fused and without PEFT parameters."""
    twin = unfuse(meta_twin(model))
    for module in twin.modules():
        drop_peft(module)
    decoder = family_of(twin).decoder_of(twin)
    for attached in ATTACHED:
        if hasattr(decoder, attached):
            delattr(decoder, attached)
    forget_method(twin)
    return twin


def forget_method(model: nn.Module) -> None:
    """Takes back what `add_peft` and `mark_loaded` have noted on a model."""
    for name in ("peft_method", "loaded_from_adapter"):
        model.__dict__.pop(name, None)


def drop_peft(module: nn.Module) -> None:
    """Turns a PeftLinear, or a norm with a widened gain, into what it was; its weight stays as it is. Anything else is
    left alone."""
    if isinstance(module, PeftLinear):
        del module.branches, module.in_scale, module.out_scale, module.magnitude
        module.__class__ = module.plain
    elif isinstance(module, WideGain):
        module.__class__ = type(module)._swapped_from


def _tuned_names(model: nn.Module) -> set[str]:
    """Full names of the parameters that are trained, or were; a tied one has one for each of its places."""
    loaded = getattr(model, "loaded_from_adapter", frozenset())
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad or name in loaded
    }


def _parts_on(model: nn.Module, family: Family, names: set[str], method: Method) -> tuple[str, ...]:
    """The parts that parameters with these names make up; a part that is trained in part counts as a whole."""
    whole, left = parts_with(names, model, family)
    parts = list(whole)
    for name in sorted(left):
        holding = [part for part in PARTS if name in part_parameters(model, family, part)]
        if not holding:
            raise ValueError(
                f"expected trained parameters of {type(method).__name__} or of a part among {list(PARTS)}, "
                f"got {name}, which an adapter's folder has no place for"
            )
        if not set(parts) & set(holding):
            parts.append(holding[-1])
    return tuple(part for part in PARTS if part in parts)

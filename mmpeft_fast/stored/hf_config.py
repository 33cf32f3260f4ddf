"""A method and the parts trained beside it as a configuration of HF PEFT, and back.

What HF PEFT does not have is described in the same form (`adapter.AdapterConfig`, `own.MethodConfig`).
"""

import copy
import dataclasses
import re
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import peft
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from mmpeft_fast.fields import check_value, shown
from mmpeft_fast.json_text import parse
from mmpeft_fast.methods import Method
from mmpeft_fast.models import Family, family_of
from mmpeft_fast.peft_model import layer_roles, part_modules
from mmpeft_fast.placement import PARTS
from mmpeft_fast.stored.form import OTHERWISE, Form, targets_of
from mmpeft_fast.stored.forms import FORMS, form_for, form_of

# Most processor time that HF PEFT may take to match a configuration's expressions against a model's module names:
# a fraction of a second is usual, and Python's expressions can take longer than anyone waits.
_MATCHING_S = 5.0
# What HF PEFT raises for values of the right type that mean nothing.
_REFUSALS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, re.error, ImportError)


def read_config(text: str, where: str) -> PeftConfig:
    """A configuration from the text of an adapter_config.json.

    Args:
        text: JSON.
        where: what the sentence begins with.

    Raises:
        ValueError: no JSON object, an unknown method, or a value that is of another type than this package reads or
            that HF PEFT refuses.
    """
    settings = parse(text, where)
    check_value(where, settings, dict)
    kinds = {str(getattr(name, "value", name)): kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kinds |= {form.config().peft_type: form.config for form in FORMS if form.config not in kinds.values()}
    kind = kinds.get(settings.get("peft_type")) if isinstance(settings.get("peft_type"), str) else None
    if kind is None:
        raise ValueError(f"{where}: expected a peft_type among {sorted(kinds)}, got {shown(settings.get('peft_type'))}")
    fields = {field.name for field in dataclasses.fields(kind)}
    for name in sorted(settings.keys() - fields):
        if settings[name]:  # nothing that another version of HF PEFT added and this adapter does not use
            raise ValueError(
                f"{where} has {name}={shown(settings[name])}, which HF PEFT {peft.__version__} does not know"
            )
    given = {name: value for name, value in settings.items() if name in fields}
    form = next((form for form in FORMS if form.config is kind), None)
    for name, hint in (form.read if form else {}).items():
        if name in given:
            check_value(f"{where}: {name}", given[name], hint)
    try:
        return kind(**given)
    except _REFUSALS as error:
        raise ValueError(f"{where}: HF PEFT takes no such {kind.__name__}: {_line(error)}") from error


def hf_config(model: nn.Module, method: Method, *, parts: Collection[str] = ()) -> PeftConfig:
    """The configuration of a method for this model.

    Args:
        model: a transformers model of a known family; not changed.
        method: any method.
        parts: whole parts (`placement.PARTS`) that are trained besides what the method itself names.

    Returns:
        HF PEFT's configuration where it has the method, else one of the same kind.

    Raises:
        ValueError: the method names a role that the family lacks.
    """
    family = family_of(model)
    placement = method.place(family.paths.roles)
    layer_roles(family, placement)
    config = form_of(method).to_config(method, placement, model, family)
    config.modules_to_save = part_names(model, family, {*placement.parts, *parts}) or None
    return config


def method_of(config: PeftConfig, model: nn.Module) -> tuple[Method, tuple[str, ...]]:
    """The method that a configuration means for this model: the inverse of `hf_config`.

    Which modules a configuration targets is found out by HF PEFT itself, on a copy of the model without memory.

    Args:
        config: one that a form reads; not changed.
        model: a plain transformers model of a known family; not changed.

    Returns:
        The method, and the parts (`placement.PARTS`) trained besides what the method itself names.

    Raises:
        ValueError: the configuration is of another method, or `add_peft` has no exact equivalent of it.
    """
    family, form = family_of(model), _form_that_reads(config)
    if not form.finds_targets:
        parts = _parts_under(model, family, config.modules_to_save or ())
        return form.take_parts(form.to_method(config, None, parts, model, family), parts)

    config = copy.deepcopy(config)
    config.base_model_name_or_path = None
    asked = copy.deepcopy(config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # nothing to draw on a model without memory
    _check_expressions(config)
    try:
        with _within(_MATCHING_S, f"{type(config).__name__}: matching its expressions against the model's modules"):
            wrapped = get_peft_model(meta_twin(model), config).get_base_model()
    except _REFUSALS as error:
        raise ValueError(f"{type(config).__name__}: HF PEFT cannot apply it: {_line(error)}") from error
    sites = {name: module for name, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)}
    saved = [name for name, module in wrapped.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    parts = _parts_under(model, family, saved)
    targets = targets_of(sites, family, model)
    return form.take_parts(form.to_method(asked, targets, parts, model, family), parts)


def part_names(model: nn.Module, family: Family, parts: Collection[str]) -> list[str]:
    """Names of the modules of whole parts; a module that two parts share is named once."""
    kept = {id(module) for module in part_modules(model, family, set(parts)) if module is not None}
    return [name for name, module in model.named_modules() if id(module) in kept]


def parts_with(names: Collection[str], model: nn.Module, family: Family) -> tuple[tuple[str, ...], set[str]]:
    """The parts whose parameters are all in `names` (full parameter names), and the names that lie in none of them."""
    found, left = [], set(names)
    for part in PARTS:
        inside = part_parameters(model, family, part)
        if inside and inside <= set(names) and inside & left:
            found.append(part)
            left -= inside
    return tuple(found), left


def part_parameters(model: nn.Module, family: Family, part: str) -> set[str]:
    """Full names of a part's parameters; a tied one has one for each of its places."""
    roots = part_names(model, family, {part})
    return {f"{root}.{name}" for root in roots for name, _ in model.get_submodule(root).named_parameters()}


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy with all parameters and buffers on the meta device: structure without memory."""
    tensors = {}
    for parameter in model.parameters():
        tensors[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        tensors[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, tensors)


def _form_that_reads(config: PeftConfig) -> Form:
    """The form of a configuration. Raises ValueError where none reads it, or it has more than what is read."""
    form = form_for(config)
    if form is None:
        known = ", ".join(dict.fromkeys(form.config.__name__ for form in FORMS))
        raise ValueError(f"expected a configuration among {known}, got {type(config).__name__}; {OTHERWISE}")
    default = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # Empty patterns and lists mean what None means.
        if field.name not in form.read and value != getattr(default, field.name) and value not in (None, {}, []):
            raise ValueError(f"{type(config).__name__}: add_peft has no {field.name}={shown(value)}; {OTHERWISE}")
    return form


def _check_expressions(config: PeftConfig) -> None:
    """Raises ValueError where a text that HF PEFT takes for a regular expression is none."""
    for name in ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern"):
        value = getattr(config, name, None)
        for text in [value] if isinstance(value, str) else value if name == "layers_pattern" and value else ():
            try:
                re.compile(text)
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{name}: expected a regular expression, got {shown(text)}: {error}") from error


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    """Raises ValueError where the block takes more processor time, also inside one call of `re`, which looks for
    signals as it matches. In the main thread only: Python gives no other a signal, and there nothing ends it."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise ValueError(f"{what} takes more than {seconds:g} s of the processor; expected a simpler expression")

    handler, (left, interval) = signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_PROF)
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, left, interval)
        signal.signal(signal.SIGPROF, handler)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}.."


def _parts_under(model: nn.Module, family: Family, roots: Collection[str]) -> tuple[str, ...]:
    """The parts that modules with these names make up. Raises ValueError where something is left over."""
    modules = dict(model.named_modules())
    if unknown := sorted(set(roots) - set(modules)):
        raise ValueError(f"modules_to_save: the model has no {unknown[0]}")
    names = {f"{root}.{name}" for root in roots for name, _ in modules[root].named_parameters()}
    parts, left = parts_with(names, model, family)
    if left:
        raise ValueError(f"modules_to_save: expected whole parts among {list(PARTS)}, got {min(left)}; {OTHERWISE}")
    return parts

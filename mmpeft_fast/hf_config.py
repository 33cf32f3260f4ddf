"""A method and the parts trained beside it as a configuration of HF PEFT, and back.

HF PEFT has no bottleneck adapter: `AdapterConfig` describes it in the same form.
"""

import copy
import dataclasses
import re
import signal
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from mmpeft_fast.fields import check_value, shown
from mmpeft_fast.json_text import parse
from mmpeft_fast.layers.plan import LINEAR_ROLES, NORM_ROLES, PARTS
from mmpeft_fast.methods import IA3, Adapter, LayerNorm, LoRA, Method, Prefix
from mmpeft_fast.models import Family, family_of
from mmpeft_fast.peft_model import layer_roles, part_modules

ADAPTER_TYPE = "MMPEFT_ADAPTER"
_OTHERWISE = "PeftModel.from_pretrained and fuse take it as it is"


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
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ADAPTER_TYPE


# What is read of a configuration, and as what; every other field must have its default.
_NAMES = list[str] | str | None
_DESCRIPTION = {
    "peft_type": object,
    "auto_mapping": dict | None,
    "peft_version": str | None,
    "base_model_name_or_path": str | None,
    "revision": str | None,
    "task_type": str | None,
    "inference_mode": bool,
    "modules_to_save": list[str] | None,
}
_TARGETING = {
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": list[int] | int | None,
    "layers_pattern": _NAMES,
}
_READ_OF = {
    LoraConfig: _DESCRIPTION
    | _TARGETING
    | {"r": int, "lora_alpha": float, "lora_dropout": float, "use_rslora": bool}
    | {"init_lora_weights": bool | str, "runtime_config": object},
    IA3Config: _DESCRIPTION | _TARGETING | {"feedforward_modules": _NAMES, "init_ia3_weights": bool},
    LNTuningConfig: _DESCRIPTION | _TARGETING,
    PrefixTuningConfig: _DESCRIPTION
    | {"num_virtual_tokens": int, "prefix_projection": bool, "encoder_hidden_size": int | None, "init_weights": object}
    | dict.fromkeys(("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"), int | None),
    AdapterConfig: _DESCRIPTION
    | {"bottleneck": int, "activation": str, "dropout": float, "scaling": float}
    | {"targets": list[str] | None, "placement": str, "init": str},
}
# Most processor time that HF PEFT may take to match a configuration's expressions against a model's module names:
# a fraction of a second is usual, and Python's expressions can take longer than anyone waits.
_MATCHING_S = 5.0
# What HF PEFT raises for values of the right type that mean nothing.
_REFUSALS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, re.error, ImportError)
_BASE_KEEPING_INITS = (True, False, "gaussian", "orthogonal")  # PiSSA and its kin change the base weights as well


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
    kinds[ADAPTER_TYPE] = AdapterConfig
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
    for name, hint in _READ_OF.get(kind, {}).items():
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
        method: any method of `mmpeft_fast.methods`.
        parts: whole parts (`plan.PARTS`) that are trained besides what the method itself names.

    Returns:
        HF PEFT's configuration; an `AdapterConfig` for an Adapter.

    Raises:
        ValueError: the method names a role that the family lacks.
    """
    family = family_of(model)
    plan = method.plan(family.paths.roles)
    layer_roles(family, plan)
    modules_to_save = part_names(model, family, {*plan.parts, *parts}) or None
    if isinstance(method, LoRA):
        return LoraConfig(
            r=method.r,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            use_rslora=method.rank_stabilized,
            target_modules=_site_pattern(family, plan.branches),
            modules_to_save=modules_to_save,
        )
    if isinstance(method, IA3):
        inputs = [role for role, where in plan.scales.items() if where == "input"]
        return IA3Config(
            target_modules=_site_pattern(family, plan.scales),
            feedforward_modules=_site_pattern(family, inputs) if inputs else [],
            modules_to_save=modules_to_save,
        )
    if isinstance(method, LayerNorm):
        pattern = _site_pattern(family, [role for role in plan.gains if role != "final_norm"])
        if "final_norm" in plan.gains:
            pattern += rf"|{_decoder_pattern(family)}\.{family.paths.norm}"
        return LNTuningConfig(target_modules=pattern, modules_to_save=modules_to_save)
    if isinstance(method, Prefix):
        config = family.decoder_of(model).config
        return PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=method.num_virtual_tokens,
            prefix_projection=method.projection,
            encoder_hidden_size=method.projection_width or config.hidden_size,
            **_prefix_shape(family, model),
            modules_to_save=modules_to_save,
        )
    settings = dataclasses.asdict(method) | {"targets": list(plan.branches)}
    return AdapterConfig(**settings, modules_to_save=modules_to_save)


def method_of(config: PeftConfig, model: nn.Module) -> tuple[Method, tuple[str, ...]]:
    """The method that a configuration means for this model: the inverse of `hf_config`.

    Which modules a configuration targets is found out by HF PEFT itself, on a copy of the model without memory.

    Args:
        config: of LoRA, IA3, LN-tuning, prefix-tuning or an `AdapterConfig`; not changed.
        model: a plain transformers model of a known family; not changed.

    Returns:
        The method, and the parts (`plan.PARTS`) trained besides what the method itself names.

    Raises:
        ValueError: the configuration is of another method, or `add_peft` has no exact equivalent of it.
    """
    family = family_of(model)
    _refuse_what_is_not_read(config)
    if isinstance(config, AdapterConfig | PrefixTuningConfig):
        parts = _parts_under(model, family, config.modules_to_save or ())
        if isinstance(config, PrefixTuningConfig):
            return _prefix_of(config, family, model), parts
        names = {field.name for field in dataclasses.fields(Adapter)}
        settings = {name: value for name, value in vars(config).items() if name in names}
        return Adapter(**settings | {"targets": tuple(config.targets or ())}), parts

    config = copy.deepcopy(config)
    config.base_model_name_or_path = None
    if isinstance(config, LoraConfig):
        config.init_lora_weights = False
    _check_expressions(config)
    try:
        with _within(_MATCHING_S, f"{type(config).__name__}: matching its expressions against the model's modules"):
            wrapped = get_peft_model(meta_twin(model), config).get_base_model()
    except _REFUSALS as error:
        raise ValueError(f"{type(config).__name__}: HF PEFT cannot apply it: {_line(error)}") from error
    sites = {name: module for name, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer)}
    saved = [name for name, module in wrapped.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    parts = _parts_under(model, family, saved)
    roles = _roles_at(sites, family, model)
    if isinstance(config, LoraConfig):
        settings = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
        return LoRA(**settings, targets=roles, rank_stabilized=config.use_rslora), parts
    if isinstance(config, IA3Config):
        return _ia3_of(sites, roles, family), parts
    if {"input_norm", "post_attention_norm"} != {*roles} - {"final_norm"}:
        raise ValueError(f"LN-tuning: expected both norms of every layer as targets, got {list(roles)}; {_OTHERWISE}")
    own = dict.fromkeys(parts, True)
    return LayerNorm(final="final_norm" in roles, **own), ()


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


def _decoder_pattern(family: Family) -> str:
    return rf"(.*\.)?{family.decoder.rsplit('.', 1)[-1]}"


def _site_pattern(family: Family, roles: Iterable[str]) -> str:
    names = "|".join(family.paths.roles[role].replace(".", r"\.") for role in roles)
    return rf"{_decoder_pattern(family)}\.{family.paths.layers}\.\d+\.({names})"


def _prefix_shape(family: Family, model: nn.Module) -> dict[str, int]:
    """The prefix's shape a layer, under HF PEFT's names."""
    config = family.decoder_of(model).config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_key_value_heads,
        "token_dim": config.num_key_value_heads * head_dim,
    }


def _refuse_what_is_not_read(config: PeftConfig) -> None:
    read = _READ_OF.get(type(config))
    if read is None:
        known = ", ".join(kind.__name__ for kind in _READ_OF)
        raise ValueError(f"expected a configuration among {known}, got {type(config).__name__}; {_OTHERWISE}")
    default = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # Empty patterns and lists mean what None means.
        if field.name not in read and value != getattr(default, field.name) and value not in (None, {}, []):
            raise ValueError(f"{type(config).__name__}: add_peft has no {field.name}={shown(value)}; {_OTHERWISE}")
    init = getattr(config, "init_lora_weights", True)
    if init not in _BASE_KEEPING_INITS:
        raise ValueError(f"LoraConfig: init_lora_weights={shown(init)} changes the base weights; {_OTHERWISE}")


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


def _roles_at(sites: Collection[str], family: Family, model: nn.Module) -> tuple[str, ...]:
    """The roles that modules with these names play. Raises ValueError unless they are all of each role's sites."""
    paths, num_layers = family.paths, len(family.layers_of(model))
    places = {
        role: {f"{family.decoder}.{paths.layers}.{idx}.{paths.roles[role]}" for idx in range(num_layers)}
        for role in (*LINEAR_ROLES, *NORM_ROLES)
        if role in paths.roles
    }
    places["final_norm"] = {f"{family.decoder}.{paths.norm}"}
    roles = tuple(role for role, names in places.items() if names & set(sites))
    for role in roles:
        if missing := places[role] - set(sites):
            raise ValueError(
                f"expected role {role!r} adapted in all {num_layers} layers, {min(missing)} is not; {_OTHERWISE}"
            )
    if outside := set(sites) - set().union(*(places[role] for role in roles)):
        raise ValueError(f"add_peft adapts the decoder's linear layers and norms, not {min(outside)}; {_OTHERWISE}")
    return roles


def _parts_under(model: nn.Module, family: Family, roots: Collection[str]) -> tuple[str, ...]:
    """The parts that modules with these names make up. Raises ValueError where something is left over."""
    modules = dict(model.named_modules())
    if unknown := sorted(set(roots) - set(modules)):
        raise ValueError(f"modules_to_save: the model has no {unknown[0]}")
    names = {f"{root}.{name}" for root in roots for name, _ in modules[root].named_parameters()}
    parts, left = parts_with(names, model, family)
    if left:
        raise ValueError(f"modules_to_save: expected whole parts among {list(PARTS)}, got {min(left)}; {_OTHERWISE}")
    return parts


def _ia3_of(sites: dict[str, nn.Module], roles: tuple[str, ...], family: Family) -> IA3:
    method = IA3(targets=roles)
    for role, where in method.plan(family.paths.roles).scales.items():
        for name, site in sites.items():
            if name.endswith(f".{family.paths.roles[role]}") and site.is_feedforward != (where == "input"):
                got = "input" if site.is_feedforward else "output"
                raise ValueError(f"IA3: expected the {where} of {name} scaled, got its {got}; {_OTHERWISE}")
    return method


def _prefix_of(config: PrefixTuningConfig, family: Family, model: nn.Module) -> Prefix:
    for name, expected in _prefix_shape(family, model).items():
        if getattr(config, name) not in (None, expected):
            raise ValueError(f"prefix-tuning: expected {name}={expected}, got {getattr(config, name)}")
    return Prefix(
        num_virtual_tokens=config.num_virtual_tokens,
        projection=config.prefix_projection,
        projection_width=config.encoder_hidden_size if config.prefix_projection else None,
    )

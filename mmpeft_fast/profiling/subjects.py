"""What is profiled: a training step, a decoder layer, or the q, k, v projections behind their norm, of a model with
random weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.layers.sites import read_linear, read_norm
from mmpeft_fast.models import FAMILIES, base_model, family_of, tiny_names
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.peft_model import add_peft, fuse, study_method
from mmpeft_fast.plan.request import DENSE, Request, model_config
from mmpeft_fast.stored.baseline import add_baseline

WHAT = ("step", "layer", "op")
TINY_MODELS = tiny_names()
_TINY_VOCABULARY = 512
_SEED = 0


@dataclass(frozen=True)
class Subject:
    """model: the one that runs, in its wrapper. run(): once, forward and backward, optimizer in a step.
    region: what `plan.parts.Regions` calls ops outside the model's modules."""

    model: nn.Module
    origin: str
    run: Callable[[], None]
    region: str


def config_of(model: str, num_layers: int | None) -> PretrainedConfig:
    """The configuration of a tiny model, of a family's size, or in a local folder; with `num_layers` decoder layers.

    Raises:
        ValueError: no such model, or more layers than it has.
    """
    if model in TINY_MODELS:
        family = FAMILIES[TINY_MODELS[model]]
        names = list(dict.fromkeys(["<pad>", "<s>", "</s>", *family.special_tokens]))
        config = family.tiny_config(_TINY_VOCABULARY, names.index)
    else:
        try:
            config = model_config(model)
        except ValueError as error:
            raise ValueError(f"{error}; tiny models are {sorted(TINY_MODELS)}") from error
    text = config.get_text_config()
    if num_layers is not None:
        if not 1 <= num_layers <= text.num_hidden_layers:
            raise ValueError(f"layers: expected 1 to {text.num_hidden_layers} for {model}, got {num_layers}")
        text.num_hidden_layers = num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:num_layers]
    return config


def subject(what: str, request: Request, config: PretrainedConfig, device: torch.device) -> Subject:
    """A model of `config` set up as `request` says, and what of it runs.

    Raises:
        ValueError: the request does not fit its model, or the implementation has no such part on its own.
    """
    model, origin = _model(request, config, device)
    inputs = _inputs(request, config, device)
    if what == "step":
        return Subject(model, origin, _step(model, inputs), "inputs")
    if request.implementation == "peft" and request.method == "prefix" and origin.startswith("HF PEFT"):
        raise ValueError(
            f"what: expected step with method prefix and implementation peft, got {what}; HF PEFT keeps the prefix in "
            "the key/value cache, which a layer alone does not have"
        )
    layer = family_of(model).layers_of(base_model(model))[0]
    args, kwargs = _arguments(model, layer, inputs)
    hidden, others = args[0] if args else kwargs.pop("hidden_states"), args[1:]
    kwargs.pop("supervised_rows", None)  # all positions, also where the first layer is the last one
    if what == "layer":
        return Subject(model, origin, _pass(model, lambda x: layer(x, *others, **kwargs), hidden), "decoder")
    project = _projections(layer, family_of(model).paths, is_fused=request.implementation == "fused")
    return Subject(model, origin, _pass(model, project, hidden), "decoder")


def _model(request: Request, config: PretrainedConfig, device: torch.device) -> tuple[nn.Module, str]:
    """The model to train, with random weights, and whose code it is."""
    family = next(family for family in FAMILIES.values() if config.model_type in family.model_types)
    config._attn_implementation = "sdpa"
    dtype, default = DTYPES[request.dtype], torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        torch.set_default_dtype(dtype)
        try:
            with device:
                model = family.model_class(config)
        finally:
            torch.set_default_dtype(default)
    if request.base != DENSE:
        from mmpeft_fast.quantised import quantise

        quantise(model, request.base)
    if request.implementation == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
        return model.train(), "transformers"
    own = {id(parameter) for parameter in model.parameters()}
    method = study_method(model, request.method, **request.settings)
    if request.implementation == "peft":
        model, origin = add_baseline(model, method)
    else:
        model, origin = add_peft(model, method), "mmpeft-fast"
    model.to(device)
    if not request.fp32_adapters:
        for parameter in model.parameters():
            if id(parameter) not in own and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return (fuse(model) if request.implementation == "fused" else model).train(), origin


class _Pixels:
    """Random pixels where the planner has placeholders."""

    @staticmethod
    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED)).to(dtype)


def _inputs(request: Request, config: PretrainedConfig, device: torch.device) -> dict:
    batch = request.batch(config, _Pixels().empty)
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    inputs["use_cache"] = False
    return inputs


def _step(model: nn.Module, inputs: dict) -> Callable[[], None]:
    """Forward, backward and AdamW; without the last where nothing is trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained) if trained else None

    def run() -> None:
        model(**inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def _arguments(model: nn.Module, layer: nn.Module, inputs: dict) -> tuple[tuple, dict]:
    """What a layer is called with in a training step, without graph."""
    found: list[tuple[tuple, dict]] = []
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: found.append((args, kwargs)), with_kwargs=True)
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    args, kwargs = found[0]
    return args, dict(kwargs)


def _pass(model: nn.Module, function: Callable[[Tensor], object], hidden: Tensor) -> Callable[[], None]:
    """Forward and backward of a function of the hidden states [B, T, H]."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        for parameter in trained:
            parameter.grad = None
        out = function(hidden.detach().requires_grad_())
        outs = [leaf for leaf in (out if isinstance(out, tuple | list) else (out,)) if isinstance(leaf, Tensor)]
        torch.autograd.backward(outs, [torch.ones_like(leaf) for leaf in outs])

    return run


def _projections(layer: nn.Module, paths, *, is_fused: bool) -> Callable[[Tensor], object]:
    """x [B, T, H] -> q, k, v before their rotation: the norm and its linears, one fused op where fused."""
    norm, linears = paths.at(layer, "input_norm"), [paths.at(layer, role) for role in paths.projections]
    if not is_fused:
        return lambda x: _each(linears, norm(x))

    def fused(x: Tensor):
        sites = [read_linear(linear) for linear in linears]
        gain, eps = read_norm(norm)
        return fused_linear(
            x, [site.segment for site in sites], prologue="rms_norm", gain=gain, eps=eps, in_scale=sites[0].in_scale
        )

    return fused


def _each(linears: list[nn.Module], h: Tensor) -> tuple[Tensor, ...]:
    return tuple(linear(h) for linear in linears)

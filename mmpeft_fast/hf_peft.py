"""HF PEFT's layers as the fused ops take them."""

import contextlib
import functools
import sys
from collections.abc import Iterator

import peft
import torch
from peft import PrefixTuningConfig
from peft.tuners.ia3 import Linear as PeftIA3Linear
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import Linear as PeftLoraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.torchao import TorchaoLoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.vera import Linear as PeftVeraLinear
from torch import nn

from mmpeft_fast.layers.causal_lm import asks_for, called_parts, why_not_own_forward
from mmpeft_fast.layers.class_swap import Swapped, is_swapped, swap_class
from mmpeft_fast.layers.known import why_unknown_function
from mmpeft_fast.layers.prefix import CallPrefix
from mmpeft_fast.layers.reading import is_fused
from mmpeft_fast.layers.sites import (
    LinearSite,
    NormSite,
    Unfusable,
    check_bypassed,
    read_dropout,
    read_linear,
    read_norm,
    register_linear,
    register_norm,
)
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.row_norms import row_norms
from mmpeft_fast.ops.segments import Branch


def _inactive(module) -> bool:
    """Whether a tuner layer is its base layer at this moment."""
    if module.disable_adapters and module.merged:
        raise Unfusable("its adapters are merged and disabled; calling it takes them out of the weights")
    return module.disable_adapters or module.merged


def read_lora(module: PeftLoraLinear) -> LinearSite:
    site = read_linear(module.get_base_layer())
    if _inactive(module):
        return site
    branches, bias = [], site.segment.bias
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        variant = getattr(module, "lora_variant", {}).get(name)
        if variant is not None and type(variant) is not DoraLinearVariant:
            raise Unfusable(f"LoRA adapter {name!r} is a {type(variant).__name__}; expected plain LoRA or DoRA")
        if module.fan_in_fan_out:
            raise Unfusable(f"LoRA adapter {name!r} is stored transposed; expected fan_in_fan_out=False")
        down, up, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        for linear in (down, up):
            if type(linear) is not nn.Linear:
                raise Unfusable(f"LoRA adapter {name!r} has a {type(linear).__name__}; expected torch.nn.Linear")
            check_bypassed(linear, "linear")
        if variant is not None:
            return _with_direction(module, name, site)
        dropout = read_dropout(module.lora_dropout[name])
        branches.append(Branch(down.weight, up.weight, scaling, dropout=dropout))
        if up.bias is not None:
            extra = (scaling * up.bias).to(site.segment.weight.dtype or up.bias.dtype)
            bias = extra if bias is None else bias + extra
    return LinearSite(site.segment._replace(branches=tuple(branches), bias=bias))


def _with_direction(module: PeftLoraLinear, name: str, site: LinearSite) -> LinearSite:
    """DoRA: y = c * (W x + s U D x) + b with c = m / |W + s U D| by row, whose norm HF PEFT takes for a constant."""
    layer, segment = module.lora_magnitude_vector[name], site.segment
    check_bypassed(layer, "dora")
    for function in (DoraLinearVariant.forward, DoraLinearLayer.get_weight_norm, DoraLinearLayer.get_lora_weight):
        reason = why_unknown_function(function, "dora_step")
        if reason is not None:
            raise Unfusable(reason)
    down, up, scaling = module.lora_A[name].weight, module.lora_B[name], module.scaling[name]
    if type(layer) is not DoraLinearLayer or up.bias is not None or isinstance(segment.weight, PackedWeight):
        raise Unfusable(f"DoRA adapter {name!r} is on packed weights or has a bias; expected plain weights and none")
    if [each for each in module.active_adapters if each in module.lora_A] != [name]:
        raise Unfusable(f"DoRA adapter {name!r} is active beside others; expected it alone")
    if module.training and read_dropout(module.lora_dropout[name]):
        raise Unfusable(f"DoRA adapter {name!r} drops inputs of the base layer too; expected lora_dropout=0")
    direction = layer.weight / row_norms(segment.weight, down, up.weight, scaling)
    # The op scales the bias as well.
    bias = None if segment.bias is None else (segment.bias / direction).to(segment.bias.dtype)
    branch = Branch(down, up.weight, scaling)
    return LinearSite(segment._replace(branches=(branch,), bias=bias, out_scale=direction))


def read_vera(module: PeftVeraLinear) -> LinearSite:
    """y = W x + b + l_b * U (l_d * D drop(x)): D and U are frozen and all layers', the vectors l_d and l_b trained."""
    site = read_linear(module.get_base_layer())
    if _inactive(module):
        return site
    branches = []
    for name in module.active_adapters:
        if name in module.vera_lambda_d:
            inner, outer = module.vera_lambda_d[name], module.vera_lambda_b[name]
            down = module.vera_A[name][:, : module.in_features].to(inner.device) * inner[:, None]
            up = module.vera_B[name][: module.out_features].to(outer.device) * outer[:, None]
            branches.append(Branch(down, up, dropout=read_dropout(module.vera_dropout[name])))
    return site._replace(segment=site.segment._replace(branches=tuple(branches)))


def read_ia3(module: PeftIA3Linear) -> LinearSite:
    site = read_linear(module.get_base_layer())
    vectors = (
        [] if _inactive(module) else [module.ia3_l[name] for name in module.active_adapters if name in module.ia3_l]
    )
    if not vectors:
        return site
    scale = functools.reduce(torch.mul, (vector.flatten() for vector in vectors))
    if module.is_feedforward:
        return site._replace(in_scale=scale)
    return LinearSite(site.segment._replace(out_scale=scale))


def _read_ln_tuning(module: LNTuningLayer) -> NormSite:
    names = [] if _inactive(module) else module.active_adapters
    if len(names) > 1 or any(name not in module.ln_tuning_layers for name in names):
        raise Unfusable(f"LN-tuning has the active adapters {names}; expected one that it has")
    return read_norm(module.ln_tuning_layers[names[0]] if names else module.base_layer)


def register_readers() -> None:
    """Lets sites be read on HF PEFT's layers, and on bitsandbytes' and torchao's where those have been imported."""
    _register_own_readers()
    if "bitsandbytes" in sys.modules:
        from mmpeft_fast import quantised

        quantised.register()
    if "torchao.quantization" in sys.modules:
        from mmpeft_fast import torchao_weights

        torchao_weights.register()


@functools.cache
def _register_own_readers() -> None:
    for kind in (PeftLoraLinear, TorchaoLoraLinear):
        register_linear(kind, read_lora, "lora_linear")
    register_linear(PeftIA3Linear, read_ia3, "ia3_linear")
    register_linear(PeftVeraLinear, read_vera, "vera_linear")
    register_norm(LNTuningLayer, _read_ln_tuning, "ln_tuning")


class _PeftPrefix:
    """The prefix of a PeftModel while its own forward runs, and nothing at any other time: it goes to the layers with
    the call's arguments, which activation checkpointing keeps for the recomputation."""

    def __init__(self):
        self.of_call: CallPrefix | None = None

    @contextlib.contextmanager
    def handed_over(self, model: peft.PeftModel) -> Iterator[None]:
        config = model.active_peft_config
        encoder = model.prompt_encoder[model.active_adapter]
        if config.inference_mode:
            flat = encoder.embedding.weight
        else:
            tokens = model.prompt_tokens[model.active_adapter][: config.num_virtual_tokens]
            flat = encoder(tokens[None].to(encoder.embedding.weight.device))[0]
        head_dim = config.token_dim // config.num_attention_heads
        self.of_call = CallPrefix(flat, (config.num_layers, 2, config.num_attention_heads, head_dim))
        try:
            yield
        finally:
            self.of_call = None

    def to_layers(self, _, args, kwargs):
        """The decoder's forward pre-hook: what it does not know it hands to its layers."""
        return args, kwargs if self.of_call is None else {**kwargs, "prefix": self.of_call}

    def shift_positions(self, _, args, kwargs):
        """The rotary embedding's forward pre-hook."""
        if self.of_call is not None:
            kwargs = {"position_ids": args[1], **kwargs} if len(args) > 1 else kwargs
            kwargs["position_ids"] = kwargs["position_ids"] + self.of_call.flat.shape[0]
            args = args[:1]
        return args, kwargs

    def __getstate__(self):
        return {"of_call": None}


class _FusedPeftPrefixModel(Swapped):
    """Mixin for a PeftModel with prefix-tuning: hands the prefix to attention instead of building a cache from it.

    Its own forward runs where a cache is wanted, where it drops arguments (positions), where a layer is not fused, and
    where a forward above the layers is not known.
    """

    def forward(self, *args, **kwargs):
        if args or not self._can_hand_over(kwargs):
            return super().forward(*args, **kwargs)
        kwargs.pop("task_ids", None)
        with self.fused_prefix.handed_over(self):
            return self.base_model(**kwargs)

    def _can_hand_over(self, kwargs) -> bool:
        use_cache, mask = kwargs.get("use_cache"), kwargs.get("attention_mask")
        if use_cache or (use_cache is None and not self.training):
            return False
        if any(kwargs.get(name) is not None for name in ("position_ids", "token_type_ids", "past_key_values")):
            return False
        if not has_prefix(self) or (mask is not None and mask.dim() != 2):
            return False
        base = self.get_base_model()
        if asks_for(base, "output_attentions", kwargs):  # layers of their own see a prefix in a cache alone
            return False
        paths, decoder = base.paths, base.get_submodule(base.decoder_path)
        # What stands above the layers and is not known may read the cache, or call the layers of another model.
        if any(why_not_own_forward(*part) for part in ((base, "causal_lm"), *called_parts(base, decoder))):
            return False
        return all(is_swapped(layer) and is_fused(layer, paths) for layer in paths.layers_of(decoder))


def has_prefix(model: nn.Module) -> bool:
    """Whether the active adapter of a PeftModel is a prefix."""
    return isinstance(model, peft.PeftModel) and isinstance(model.active_peft_config, PrefixTuningConfig)


def fuse_prefix(model: nn.Module, decoder: nn.Module) -> None:
    """Fuses the prefix of a PeftModel; anything else is left alone."""
    if not has_prefix(model) or "fused_prefix" in model.__dict__:
        return
    prefix = model.fused_prefix = _PeftPrefix()
    model.fused_prefix_hooks = [
        decoder.register_forward_pre_hook(prefix.to_layers, with_kwargs=True),
        decoder.rotary_emb.register_forward_pre_hook(prefix.shift_positions, with_kwargs=True),
    ]
    swap_class(model, _FusedPeftPrefixModel)


def unfuse_prefix(model: nn.Module) -> None:
    """Undoes `fuse_prefix`, but for the class of the PeftModel."""
    if "fused_prefix" not in model.__dict__:
        return
    for hook in model.fused_prefix_hooks:
        hook.remove()
    del model.fused_prefix, model.fused_prefix_hooks

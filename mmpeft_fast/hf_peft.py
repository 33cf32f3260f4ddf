"""HF PEFT's layers as the fused ops take them."""

import functools

import peft
import torch
from peft import PrefixTuningConfig
from peft.tuners.ia3 import Linear as PeftIA3Linear
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import Tensor, nn

from mmpeft_fast.layers.causal_lm import asks_for_attentions
from mmpeft_fast.layers.class_swap import Swapped, swap_class
from mmpeft_fast.layers.decoder_paths import DecoderPaths
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
from mmpeft_fast.ops.segments import Branch


def _inactive(module) -> bool:
    """Whether a tuner layer is its base layer at this moment."""
    if module.disable_adapters and module.merged:
        raise Unfusable("its adapters are merged and disabled; calling it takes them out of the weights")
    return module.disable_adapters or module.merged


def _read_lora(module: PeftLoraLinear) -> LinearSite:
    site = read_linear(module.get_base_layer())
    if _inactive(module):
        return site
    branches, bias = [], site.segment.bias
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if getattr(module, "lora_variant", {}).get(name) is not None or module.use_dora.get(name, False):
            raise Unfusable(f"LoRA adapter {name!r} is a variant (DoRA or other); expected plain LoRA")
        if module.fan_in_fan_out:
            raise Unfusable(f"LoRA adapter {name!r} is stored transposed; expected fan_in_fan_out=False")
        down, up, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        for linear in (down, up):
            if type(linear) is not nn.Linear:
                raise Unfusable(f"LoRA adapter {name!r} has a {type(linear).__name__}; expected torch.nn.Linear")
            check_bypassed(linear, "linear")
        dropout = read_dropout(module.lora_dropout[name])
        branches.append(Branch(down.weight, up.weight, scaling, dropout=dropout))
        if up.bias is not None:
            extra = (scaling * up.bias).to(site.segment.weight.dtype)
            bias = extra if bias is None else bias + extra
    return LinearSite(site.segment._replace(branches=tuple(branches), bias=bias))


def _read_ia3(module: PeftIA3Linear) -> LinearSite:
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


@functools.cache
def register_readers() -> None:
    """Lets `read_linear` and `read_norm` understand HF PEFT's layers."""
    register_linear(PeftLoraLinear, _read_lora, "lora_linear")
    register_linear(PeftIA3Linear, _read_ia3, "ia3_linear")
    register_norm(LNTuningLayer, _read_ln_tuning, "ln_tuning")


class _PeftPrefix:
    """The prefix of a PeftModel for one forward pass; `active` while its own forward runs, when no cache holds it."""

    def __init__(self):
        self.flat: Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self.active = False

    def prepare(self, model: peft.PeftModel) -> None:
        config = model.active_peft_config
        encoder = model.prompt_encoder[model.active_adapter]
        if config.inference_mode:
            self.flat = encoder.embedding.weight
        else:
            tokens = model.prompt_tokens[model.active_adapter][: config.num_virtual_tokens]
            self.flat = encoder(tokens[None].to(encoder.embedding.weight.device))[0]
        head_dim = config.token_dim // config.num_attention_heads
        self.shape = (config.num_layers, 2, config.num_attention_heads, head_dim)

    def shift_positions(self, _, args, kwargs):
        if self.active:
            kwargs = {"position_ids": args[1], **kwargs} if len(args) > 1 else kwargs
            kwargs["position_ids"] = kwargs["position_ids"] + self.flat.shape[0]
            args = args[:1]
        return args, kwargs

    def __getstate__(self):
        return {**self.__dict__, "flat": None}


class _PeftPrefixSlice:
    """One layer's prefix."""

    def __init__(self, prefix: _PeftPrefix, layer_idx: int):
        self.prefix, self.layer_idx = prefix, layer_idx

    @property
    def lives_in_cache(self) -> bool:
        """Generation through HF PEFT puts the prefix into the cache; the fused forward pass does not."""
        return not self.prefix.active

    @property
    def needs_fused_layers(self) -> bool:
        """Whether a layer that ran its own forward now would miss the prefix."""
        return self.prefix.active

    def __call__(self) -> tuple[Tensor, Tensor] | None:
        if self.prefix.flat is None:
            return None
        pair = self.prefix.flat.unflatten(1, self.prefix.shape)[:, self.layer_idx]  # [P, 2, HK, DH]
        return pair[:, 0].transpose(0, 1), pair[:, 1].transpose(0, 1)


class _FusedPeftPrefixModel(Swapped):
    """Mixin for a PeftModel with prefix-tuning: hands the prefix to attention instead of building a cache from it."""

    def forward(self, *args, **kwargs):
        if asks_for_attentions(self.get_base_model(), kwargs):  # layers of their own see a prefix in a cache alone
            return super().forward(*args, **kwargs)
        prefix = self.fused_prefix
        prefix.prepare(self)
        prefix.active = True
        try:
            kwargs.pop("task_ids", None)
            return self.base_model(*args, **kwargs)
        finally:
            prefix.active = False


def has_prefix(model: nn.Module) -> bool:
    """Whether the active adapter of a PeftModel is a prefix."""
    return isinstance(model, peft.PeftModel) and isinstance(model.active_peft_config, PrefixTuningConfig)


def fuse_prefix(model: nn.Module, decoder: nn.Module, paths: DecoderPaths) -> None:
    """Fuses the prefix of a PeftModel; anything else is left alone."""
    if not has_prefix(model) or "fused_prefix" in model.__dict__:
        return
    model.fused_prefix = _PeftPrefix()
    hook = decoder.rotary_emb.register_forward_pre_hook(model.fused_prefix.shift_positions, with_kwargs=True)
    model.fused_prefix_hook = hook
    for layer_idx, layer in enumerate(paths.layers_of(decoder)):
        paths.attention_of(layer).prefix = _PeftPrefixSlice(model.fused_prefix, layer_idx)
    swap_class(model, _FusedPeftPrefixModel)


def unfuse_prefix(model: nn.Module, decoder: nn.Module, paths: DecoderPaths) -> None:
    """Undoes `fuse_prefix`, but for the class of the PeftModel."""
    if "fused_prefix" not in model.__dict__:
        return
    model.fused_prefix_hook.remove()
    for layer in paths.layers_of(decoder):
        del paths.attention_of(layer).prefix
    del model.fused_prefix, model.fused_prefix_hook

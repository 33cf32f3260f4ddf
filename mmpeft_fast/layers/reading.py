"""Reading a decoder layer: what it is made of, and whether its own computation is the one that fused code does.

A reading is taken once and trusted as long as nothing that it looked at has changed (`layers.snapshot`): no attribute
of the layer or of a module below it, no hook, no class, no function that the library's code calls, no attention
implementation.
"""

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmpeft_fast.layers import known, snapshot
from mmpeft_fast.layers.class_swap import own_class
from mmpeft_fast.layers.decoder_paths import DecoderPaths
from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.layers.sites import (
    GLOBAL_HOOKS,
    LinearSite,
    NormSite,
    Unfusable,
    check_bypassed,
    check_no_global_hooks,
    is_plain,
    is_recorded,
    read_linear,
    read_norm,
    recorded_key,
)
from mmpeft_fast.layers.snapshot import Lookup
from mmpeft_fast.ops.autocast import autocast_dtype
from mmpeft_fast.ops.packed import PackedWeight

# Attention functions of transformers: the name under which a configuration asks for them, and the module of each.
_ATTENTION_FUNCTIONS = {
    "sdpa": "transformers.integrations.sdpa_attention",
    "flash_attention_2": "transformers.integrations.flash_attention",
    "flash_attention_3": "transformers.integrations.flash_attention",
    "flash_attention_4": "transformers.integrations.flash_attention",
}
# Arguments of a layer that change what transformers' attention functions compute. Flash attention reads more of them.
# With the value that changes nothing; None changes nothing either.
_READ_BY_ATTENTION = {
    "is_causal": True, "output_attentions": False, "position_bias": None, "cache": None, "softcap": None, "s_aux": None,
}  # fmt: skip
_READ_BY_FLASH = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"))


class Recorded(Unfusable):
    """transformers records in this call, in every layer, what the fused layer does not compute."""


class LayerSites(NamedTuple):
    """What a decoder layer is made of at this moment. `head_norms`: of q and k, None where there are none."""

    input_norm: NormSite
    projections: list[LinearSite]
    head_norms: list[NormSite | None]
    o: LinearSite
    post_attention_norm: NormSite
    gate: LinearSite
    up: LinearSite
    down: LinearSite

    @property
    def linears(self) -> tuple[LinearSite, ...]:
        return (*self.projections, self.o, self.gate, self.up, self.down)

    def with_linear(self, role: str, paths: DecoderPaths, site: LinearSite | None) -> "LayerSites":
        """The same with another site, or with none, in the place of a role."""
        if role not in paths.projections:
            return self._replace(**{role: site})
        projections = list(self.projections)
        projections[paths.projections.index(role)] = site
        return self._replace(projections=projections)


def read_layer(layer: nn.Module, paths: DecoderPaths) -> LayerSites:
    """Reads a decoder layer as `FusedDecoderLayer` computes it.

    Raises:
        Unfusable: the layer's own computation is another one, or not known.
    """
    try:
        return _read_layer(layer, paths)
    except AttributeError as error:
        raise Unfusable(f"it is built differently: {error}") from None


def _read_layer(layer: nn.Module, paths: DecoderPaths) -> LayerSites:
    reason = known.why_unknown(own_class(layer), "decoder_layer")
    if reason is not None:
        raise Unfusable(reason)
    check_no_global_hooks()
    for path in paths.containers:
        check_bypassed(attrgetter(path)(layer), paths.container_role(path))
    attn = paths.attention_of(layer)
    _check_attention(attn)
    if paths.activation is not None:
        _check_activation(attrgetter(paths.activation)(layer))
    sites = LayerSites(
        input_norm=read_norm(paths.at(layer, "input_norm")),
        projections=[read_linear(paths.at(layer, role)) for role in paths.projections],
        head_norms=[read_norm(getattr(attn, name)) if hasattr(attn, name) else None for name in ("q_norm", "k_norm")],
        o=read_linear(paths.at(layer, "o")),
        post_attention_norm=read_norm(paths.at(layer, "post_attention_norm")),
        **{role: read_linear(paths.at(layer, role)) for role in ("gate", "up", "down")},
    )
    for names, together in (("q, k, v", sites.projections), ("gate, up", [sites.gate, sites.up])):
        if any(site.in_scale is not together[0].in_scale for site in together):
            raise Unfusable(f"{names} share an input but not its scale; expected one input scale or none")
        if len({site.segment.weight.dtype for site in together}) > 1:
            raise Unfusable(f"{names} share an input but are multiplied in several dtypes")
    return sites


def _check_activation(activation: object) -> None:
    if not isinstance(activation, nn.Module):
        raise Unfusable(f"its activation is a {type(activation).__name__}; expected SiLU as a module")
    if type(activation).__name__ not in ("SiLU", "SiLUActivation"):
        raise Unfusable(f"its activation is {type(activation).__name__}; expected SiLU")
    check_bypassed(activation, "silu")


def _interface(attn: nn.Module):
    """transformers' mapping of attention functions, as this attention's forward sees it; None where it has none."""
    return known.namespace_of(type(attn)).get("ALL_ATTENTION_FUNCTIONS")


def _implementation(attn: nn.Module) -> str:
    """The name under which an attention looks its function up; "eager" is the one in its own file."""
    return attn.config._attn_implementation or "eager"


def _check_attention(attn: nn.Module) -> None:
    if getattr(attn, "attention_dropout", 0.0):
        raise Unfusable(f"its attention dropout is {attn.attention_dropout}; expected 0")
    if not getattr(attn, "is_causal", True):
        raise Unfusable("its attention is not causal")
    interface = _interface(attn)
    if interface is None:
        return
    name = _implementation(attn)
    if name != "eager":
        function = interface.get(name)
        shipped = known.is_shipped(function, _ATTENTION_FUNCTIONS.get(name, "")) or known.is_own(function)
        if not shipped:
            raise Unfusable(f"its attention implementation {name!r} is not one of {['eager', *_ATTENTION_FUNCTIONS]}")
        replaced = known.why_replaced(function)
        if replaced is not None:
            raise Unfusable(f"its attention implementation {name!r} calls something else: {replaced}")
    if getattr(attn.config, "sliding_window", None) and "flash" in name:
        raise Unfusable(
            "its window is known to transformers' flash attention alone; expected attn_implementation='sdpa'"
        )


def _attention_lookups(attn: nn.Module) -> Iterator[Lookup]:
    interface = _interface(attn)
    if interface is not None:
        yield Lookup(attn.config, "_attn_implementation", attn.config._attn_implementation)
        for mapping in (interface._local_mapping, interface._global_mapping):
            yield Lookup(mapping, _implementation(attn), mapping.get(_implementation(attn)))
        function = interface.get(_implementation(attn))
        if function is not None:
            yield from known.judge_calls(function).lookups


class Reading:
    """What a layer was read as, and a snapshot of what that rests on. Lies in the layer's `__dict__`; copies and
    pickles of a layer start without one."""

    def __init__(self):
        self._snapshot = None
        self._sites: LayerSites | None = None
        self._reason: str | None = None
        self._recorded: set[str] = set()
        self._moving: list[str] = []  # roles whose tensors are computed from parameters
        self._packed: list[PackedWeight] = []

    def __deepcopy__(self, memo) -> "Reading":
        return Reading()

    def __reduce__(self):
        return Reading, ()

    def sites(self, layer: nn.Module, paths: DecoderPaths) -> LayerSites:
        """`read_layer`, from memory where nothing has changed.

        Raises:
            Unfusable: as `read_layer`.
            Recorded: transformers records what the fused layer does not compute.
        """
        if self._snapshot is None or not self._snapshot.holds(layer):
            self._read(layer, paths)
        if self._reason is not None:
            raise Unfusable(self._reason)
        if self._recorded and is_recorded(self._recorded):
            raise Recorded(f"{', '.join(sorted(self._recorded))} are asked for, which the fused layer does not compute")
        if any(GLOBAL_HOOKS):
            check_no_global_hooks()
        for weight in self._packed:
            reason = weight.why_not_now()
            if reason is not None:
                raise Unfusable(reason)
        return self._again(layer, paths) if self._moving else self._sites

    def _read(self, layer: nn.Module, paths: DecoderPaths) -> None:
        self._reason = self._sites = None
        try:
            # What is computed here is computed again for the call. With a graph this would save tensors in a first call
            # that a recomputation, which finds the layer read, does not.
            with torch.no_grad():
                self._sites = read_layer(layer, paths)
        except Unfusable as reason:
            self._reason = str(reason)
        modules = list(layer.modules())
        self._recorded = {
            key for module in modules[1:] for hook in module._forward_hooks.values() if (key := recorded_key(hook))
        }
        self._moving, self._packed = [], []
        if self._sites is not None:
            weights = [site.segment.weight for site in self._sites.linears]
            self._packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
            roles = (*paths.projections, "o", "gate", "up", "down")
            self._moving = [role for role, site in zip(roles, self._sites.linears, strict=True) if not site.is_found]
            for role in self._moving:  # what was computed for this call alone is not kept
                self._sites = self._sites.with_linear(role, paths, None)
        kinds = {own_class(module) for module in modules}
        kinds |= {kind.plain for kind in kinds if issubclass(kind, PeftLinear)}  # whose forward is called inside theirs
        lookups = list(known.lookups_of(kinds))
        with contextlib.suppress(AttributeError):  # of a layer that is built differently
            lookups += _attention_lookups(paths.attention_of(layer))
        once = {(id(lookup.owner), lookup.name): lookup for lookup in lookups}
        self._snapshot = snapshot.take(modules, list(once.values()), self)

    def _again(self, layer: nn.Module, paths: DecoderPaths) -> LayerSites:
        """The sites with those read again whose tensors are computed from parameters, so that they belong to this
        call's graph."""
        sites = self._sites
        for role in self._moving:
            sites = sites.with_linear(role, paths, read_linear(paths.at(layer, role)))
        return sites


def sites_of(layer: nn.Module, paths: DecoderPaths) -> LayerSites:
    """`read_layer`, remembered. A compiled graph reads when it is traced.

    Raises:
        Unfusable: as `read_layer`.
    """
    if torch.compiler.is_compiling():
        sites = read_layer(layer, paths)
        if any(isinstance(site.segment.weight, PackedWeight) for site in sites.linears):
            raise Unfusable("its weights are packed, which a compiled layer does not unpack")
        return sites
    reading = layer.__dict__.get("reading")
    if reading is None:
        reading = layer.__dict__["reading"] = Reading()
    return reading.sites(layer, paths)


def is_fused(layer: nn.Module, paths: DecoderPaths) -> bool:
    """Whether a layer with a fused class would run fused now, as far as the call's arguments do not decide it."""
    try:
        sites_of(layer, paths)
    except Unfusable:
        return False
    return True


def check_dtypes(sites: LayerSites, hidden: Tensor) -> None:
    """Raises Unfusable where packed weights are multiplied in a narrower dtype than the hidden states [B, T, H] have:
    the layer's own branches and activations stay in the wider one, the fused op's would not. Under autocast they do
    not either."""
    for site in sites.linears:
        weight = site.segment.weight
        if isinstance(weight, PackedWeight) and weight.dtype not in (None, hidden.dtype):
            is_narrower = weight.dtype.itemsize < hidden.dtype.itemsize
            if is_narrower and autocast_dtype(hidden) is None:
                inner, outer = (str(dtype).removeprefix("torch.") for dtype in (weight.dtype, hidden.dtype))
                raise Unfusable(f"its {weight.name} weights are multiplied in {inner} and what comes is {outer}")


def check_arguments(attn: nn.Module, hidden: Tensor, mask: object, others: dict) -> None:
    """Raises Unfusable where the arguments of a call ask a layer's attention for something else than causal attention
    under a bool or additive mask, or are tensors that say what operators do to them. hidden: [B, T, H]; others: keyword
    arguments that the fused layer has no use for."""
    if not is_plain(hidden):
        raise Unfusable(f"the hidden states are a {type(hidden).__name__}; expected a plain tensor")
    name = _implementation(attn) if hasattr(attn, "config") else ""
    if others:
        inert = _READ_BY_ATTENTION | (_READ_BY_FLASH if "flash" in name else {})
        for other, value in others.items():
            if value is not None and other in inert and value is not inert[other]:
                raise Unfusable(f"the call has {other}, which the fused layer does not know")
    if mask is None:
        if name == "eager" and hidden.shape[1] > 1:
            raise Unfusable("eager attention without a mask sees every position")
    elif not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise Unfusable(f"the mask is a {type(mask).__name__}; expected a tensor of 2 or 4 dimensions or none")
    elif mask.dim() == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        raise Unfusable(f"the mask has dtype {mask.dtype}; expected bool or a floating one")

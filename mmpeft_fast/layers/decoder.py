"""A decoder layer as four fused linears around attention; also the class that the final norm takes on.

q, k, v, x   = fused_linear(x,  [q, k, v],    prologue=rms_norm, carry)             or one segment [qkv]
o            = attention(q, k, v, rotation, scales, head norms, prefix)
x1           = fused_linear(o,  [o],          residual=x)
gate, up, x1 = fused_linear(x1, [gate, up],   prologue=rms_norm, carry)
x2           = fused_linear((gate, up), [down], prologue=swiglu, residual=x1)
"""

import logging
from collections.abc import Collection

import torch
from torch import Tensor

from mmpeft_fast.documents import Documents
from mmpeft_fast.layers.class_swap import Swapped
from mmpeft_fast.layers.decoder_paths import DecoderPaths
from mmpeft_fast.layers.graphs import Inputs, LayerGraphs
from mmpeft_fast.layers.prefix import CallPrefix
from mmpeft_fast.layers.reading import LayerSites, Recorded, check_arguments, check_dtypes, sites_of
from mmpeft_fast.layers.sites import Unfusable, is_plain, read_norm
from mmpeft_fast.layers.split_columns import split_columns
from mmpeft_fast.ops.attention import HeadTransform, attention, concat_prefix_attention, transform_heads
from mmpeft_fast.ops.dropout import draw_seed
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.ops.rms_norm import rms_norm
from mmpeft_fast.ops.rows import take_rows

_logger = logging.getLogger(__name__)


class FusedDecoderLayer(Swapped):
    """Mixin for decoder layers made of q, k, v (or a fused qkv), o, gate, up, down, two RMSNorms and optional head
    norms, found by `paths`. Parameters stay where they are; this only replaces the computation.

    `cache_idx` is the layer's place in the cache where attention does not know it. `query_scale` [B or 1, T, 1]
    multiplies the queries (log-n attention); never in training, nor with head norms. `is_tail` marks the last
    layer: given `supervised_rows` [B, C] it computes queries (but those of a fused qkv), o, and the MLP at those
    positions only and returns [B, C, H]; keys and values are needed everywhere. `ignore_padding`: causality alone
    keeps padding out of every row that counts, so the mask is not needed. `prefix`: keys and values before the
    text's, where the call brings them; `attn.prefix` is one that the model has for good. `documents`: which tokens see
    which, in place of the mask; never with a cache.

    `recompute`: "gate_up", "qkv": which outputs are made again in the backward in place of being kept.

    `graphs`: replays training passes as CUDA graphs, for all layers of a model; None: every call runs eagerly.

    A layer that cannot be read at some call (an adapter of another kind was activated, a hook was put on a linear
    layer) runs its own forward there, and says so once; with `has_own_forward` false it raises.
    """

    paths = DecoderPaths()
    cache_idx = 0
    is_tail = False
    has_own_forward = True
    graphs: LayerGraphs | None = None
    recompute: Collection[str] = ()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        query_scale: Tensor | None = None,
        supervised_rows: Tensor | None = None,
        ignore_padding: bool = False,
        prefix: CallPrefix | None = None,
        documents: Documents | None = None,
        **kwargs,
    ) -> Tensor:
        x, paths = hidden_states, self.paths
        rows = supervised_rows if self.is_tail else None
        try:
            sites = sites_of(self, paths)
            check_arguments(paths.attention_of(self), x, attention_mask, kwargs)
            check_dtypes(sites, x)
        except Unfusable as reason:
            self._check_own_forward(reason, prefix)
            if documents is not None:
                attention_mask = documents.mask(x.shape[1], x.device)
            query = {} if query_scale is None else {"query_scale": query_scale}
            y = super().forward(
                x, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                use_cache=use_cache, position_embeddings=position_embeddings, **query, **kwargs,
            )  # fmt: skip
            return y if rows is None else take_rows(y, rows)
        mask = None if ignore_padding or documents is not None else full_mask(attention_mask, x.shape[1])
        # One draw a layer; `stream` keeps the masks of its four calls apart.
        draws = any(branch.dropout > 0.0 for site in sites.linears for branch in site.segment.branches)
        seed = draw_seed(x.device) if draws else None
        # A layer that somebody moved takes its place in the cache, and its part of HF PEFT's prefix, along.
        place = getattr(paths.attention_of(self), "layer_idx", self.cache_idx)
        inputs = Inputs(x, *position_embeddings, mask, seed, *self._prefix(prefix, place))
        if self.graphs is not None and all(part is None for part in (rows, past_key_values, query_scale, documents)):
            settings = self._head_settings()
            y = self.graphs.run(self, self.cache_idx, sites, settings, inputs, self._compute)
            if y is not None:
                return y
        cache = None if past_key_values is None else (past_key_values, place)
        return self._compute(sites, inputs, rows=rows, cache=cache, query_scale=query_scale, documents=documents)

    def _prefix(self, prefix: CallPrefix | None, place: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Keys and values [HK, P, DH] before the text's, as the call or the model has them."""
        if prefix is not None:
            return prefix.layer(place)
        attn = self.paths.attention_of(self)
        return attn.prefix() if hasattr(attn, "prefix") else (None, None)

    def _compute(
        self,
        sites: LayerSites,
        inputs: Inputs,
        *,
        rows: Tensor | None = None,
        cache=None,
        query_scale=None,
        documents: Documents | None = None,
    ) -> Tensor:
        """The layer's output from what it was read as. cache: keys and values of earlier calls and the layer's place
        there."""
        x, seed = inputs.x, inputs.seed
        (gain, eps), projections = sites.input_norm, sites.projections
        o, gate, up, down = sites.o, sites.gate, sites.up, sites.down

        # The output scales of q, k, v are left to attention, which redoes them in its backward.
        def project(x, *sites):
            segments = [site.segment._replace(out_scale=None) for site in sites]
            return fused_linear(
                x, segments, prologue="rms_norm", gain=gain, eps=eps, in_scale=sites[0].in_scale, seed=seed, carry=True
            )

        def at_rows(x):
            return x if rows is None else take_rows(x, rows)

        if len(projections) == 1:
            qkv, x = project(x, *projections)
            q, k, v = split_columns(qkv, 3)
            q, x = at_rows(q), at_rows(x)
            out_scale = projections[0].segment.out_scale
            scales = (None,) * 3 if out_scale is None else out_scale.chunk(3)
        else:
            scales = [site.segment.out_scale for site in projections]
            if rows is None:
                q, k, v, x = project(x, *projections)
            else:
                k, v, x = project(x, *projections[1:])
                q, x = project(at_rows(x), projections[0])
        if query_scale is not None:
            q = (q * query_scale).to(q.dtype)

        attended = self._attend((q, k, v), scales, sites.head_norms, inputs, cache, rows, documents)
        x1 = fused_linear(attended, [o.segment], in_scale=o.in_scale, residual=x, seed=seed, stream=1)

        gain, eps = sites.post_attention_norm
        gate_y, up_y, x1 = fused_linear(
            x1, [gate.segment, up.segment], prologue="rms_norm", gain=gain, eps=eps,
            in_scale=gate.in_scale, seed=seed, stream=2, carry=True,
        )  # fmt: skip
        return fused_linear(
            (gate_y, up_y), [down.segment], prologue="swiglu", in_scale=down.in_scale, residual=x1, seed=seed, stream=3,
            recompute="gate_up" in self.recompute,
        )  # fmt: skip

    def _check_own_forward(self, reason: Unfusable, prefix: CallPrefix | None) -> None:
        """Says once that the layer runs its own forward, or raises where that would not compute the same."""
        if not self.has_own_forward or prefix is not None:
            raise reason
        who = f"layer {self.cache_idx} runs"
        if isinstance(reason, Recorded):
            if self.cache_idx:  # one layer speaks for all
                return
            who = "all layers run"
        if torch.compiler.is_compiling():
            _say(who, str(reason))
        elif str(reason) not in self.__dict__.setdefault("said", set()):
            self.said.add(str(reason))
            _say(who, str(reason))

    def _head_settings(self) -> tuple[int, float]:
        """Width of a head, and what its scores are scaled by."""
        attn = self.paths.attention_of(self)
        return attn.head_dim, getattr(attn, "scaling", attn.head_dim**-0.5)

    def _attend(self, raw, scales, head_norms, inputs: Inputs, cache, rows, documents) -> Tensor:
        head_dim, scale = self._head_settings()
        gains = [None if norm is None else norm.gain for norm in head_norms]
        head_eps = next((norm.eps for norm in head_norms if norm is not None), 0.0)
        q_how, k_how, v_how = map(HeadTransform, scales, (*gains, None))
        cos, sin, mask, prefix = inputs.cos, inputs.sin, inputs.mask, inputs.prefix
        if cache is None:
            return attention(
                *raw, cos, sin, head_dim=head_dim, scale=scale, mask=mask, rows=rows, documents=documents, q_how=q_how,
                k_how=k_how, v_scale=v_how.scale, eps=head_eps, prefix=prefix, overwrite=True,
                recompute="qkv" in self.recompute,
            )  # fmt: skip
        # Cached decoding: plain differentiable torch on what the cache returns.
        q = transform_heads(raw[0], q_how, cos, sin, head_dim, head_eps)
        k = transform_heads(raw[1], k_how, cos, sin, head_dim, head_eps)
        v = transform_heads(raw[2], v_how, None, None, head_dim, head_eps)
        keys_and_values, place = cache
        k, v = keys_and_values.update(k, v, place)
        causal = mask is None and q.shape[2] > 1
        out = concat_prefix_attention(q, k, v, scale=scale, mask=mask, causal=causal, prefix=prefix)
        return out.transpose(1, 2).flatten(-2)


@torch.compiler.assume_constant_result  # a compiled graph says it when it is traced
def _say(who: str, reason: str) -> None:
    _logger.warning("%s unfused: %s", who, reason)


def full_mask(mask: Tensor | None, num_queries: int) -> Tensor | None:
    """The mask as attention takes it: None (causal) or [B, 1, Tq, Tk]; a padding mask [B, Tk] (what flash attention
    implementations are given) is combined with causality."""
    if mask is None or mask.dim() == 4:
        return mask
    keys = mask.shape[1]
    causal = torch.ones(num_queries, keys, dtype=torch.bool, device=mask.device).tril_(keys - num_queries)
    return causal[None, None] & mask.bool()[:, None, None, :]


class FusedRMSNorm(Swapped):
    """Mixin for a norm that stays a module of its own (the final one): saves its input, no normalised copy."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        try:
            gain, eps = read_norm(self, is_called=True)
        except Unfusable:
            return super().forward(hidden_states)
        if not is_plain(hidden_states):  # it says itself what operators do to it
            return super().forward(hidden_states)
        return rms_norm(hidden_states, gain, eps)

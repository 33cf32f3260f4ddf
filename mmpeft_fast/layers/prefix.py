"""Trainable prefix keys and values (Li & Liang 2021) with the semantics of arXiv 2406.05130's code.

Parameters [P, 2 * L * HK * DH], viewed as L pairs (K, V) of [HK, P, DH]. Prefix keys are not rotated, text positions
start at P, every query sees all prefix columns, labels are not extended.
"""

from typing import NamedTuple

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.attention import concat_prefix_attention
from mmpeft_fast.placement import PrefixPlacement

EAGER_PREFIX = "mmpeft_prefix"


class CallPrefix(NamedTuple):
    """A materialised prefix that goes to the layers with one call.

    flat: [P, 2 * L * HK * DH]; shape: (L, 2, HK, DH).
    """

    flat: Tensor
    shape: tuple[int, int, int, int]

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K, V of one layer, each [HK, P, DH]."""
        pair = self.flat.unflatten(1, self.shape)[:, layer_idx]  # [P, 2, HK, DH]
        return pair[:, 0].transpose(0, 1), pair[:, 1].transpose(0, 1)


class PrefixEncoder(nn.Module):
    """Holds the prefix of all layers: `embedding` [P, 2 * L * HK * DH], or with projection an embedding [P, H] and a
    Linear-tanh-Linear that makes the same matrix once a forward pass, not once a sample."""

    def __init__(
        self,
        placement: PrefixPlacement,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        like: Tensor,
    ):
        super().__init__()
        self.num_virtual_tokens = placement.num_virtual_tokens
        self.shape = (num_layers, 2, num_kv_heads, head_dim)
        width = 2 * num_layers * num_kv_heads * head_dim
        options = {"dtype": accumulate_dtype(like.dtype), "device": like.device}
        self.transform = None
        if placement.projection:
            inner = placement.projection_width or hidden_size
            self.transform = nn.Sequential(
                nn.Linear(hidden_size, inner, **options), nn.Tanh(), nn.Linear(inner, width, **options)
            )
        embedding_width = hidden_size if placement.projection else width
        self.embedding = nn.Embedding(placement.num_virtual_tokens, embedding_width, **options)
        self._projected: Tensor | None = None

    def forward(self) -> Tensor:
        """The materialised prefix [P, 2 * L * HK * DH]."""
        return self.embedding.weight if self.transform is None else self.transform(self.embedding.weight)

    def prepare(self, *_) -> None:
        """Runs the projection for the coming forward pass; registered as the decoder's forward pre-hook."""
        self._projected = None if self.transform is None else self()

    def layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K, V of one layer, each [HK, P, DH]."""
        flat = self.embedding.weight if self.transform is None else self._projected
        return CallPrefix(flat, self.shape).layer(layer_idx)

    def shift_positions(self, _, args, kwargs):
        """Text positions start at P: registered as the rotary embedding's forward pre-hook."""
        shifted = {
            name: kwargs[name] + self.num_virtual_tokens
            for name in ("position_ids", "columns")
            if kwargs.get(name) is not None
        }
        if len(args) > 1:
            args = (args[0], args[1] + self.num_virtual_tokens, *args[2:])
        kwargs = {**kwargs, **shifted}
        return args, kwargs

    def __getstate__(self):
        # The projection of the last forward pass is a graph tensor: copies and pickles start without it.
        return {**self.__dict__, "_projected": None}


class PrefixSlice:
    """One layer's view of a PrefixEncoder; kept on the attention module as a plain attribute, so that the parameters
    stay registered in one place."""

    def __init__(self, encoder: PrefixEncoder, layer_idx: int):
        self.encoder, self.layer_idx = encoder, layer_idx

    def __call__(self) -> tuple[Tensor, Tensor]:
        return self.encoder.layer(self.layer_idx)


def _eager_prefix_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention interface: [B, H, T, DH] in, [B, T, H, DH] out."""
    causal = attention_mask is None and query.shape[2] > 1
    prefix = module.prefix() if hasattr(module, "prefix") else None  # not every layer has one
    out = concat_prefix_attention(query, key, value, scale=scaling, mask=attention_mask, causal=causal, prefix=prefix)
    return out.transpose(1, 2).contiguous(), None


def _check_attention(decoder: nn.Module, _) -> None:
    """No other attention sees the prefix: it would be lost silently, and its gradient with it."""
    chosen = decoder.config._attn_implementation
    if chosen != EAGER_PREFIX:
        raise ValueError(
            f"attention {chosen!r} does not see the prefix of add_peft; expected set_attn_implementation"
            f"({EAGER_PREFIX!r}), as add_peft chose it"
        )


def attach_prefix(decoder: nn.Module, attentions: list[nn.Module], encoder: PrefixEncoder) -> None:
    """Registers `encoder` on the decoder and lets every attention module see its slice, eagerly and fused alike."""
    AttentionInterface.register(EAGER_PREFIX, _eager_prefix_attention)
    AttentionMaskInterface.register(EAGER_PREFIX, sdpa_mask)
    decoder.prefix_encoder = encoder
    decoder.register_forward_pre_hook(encoder.prepare)
    decoder.register_forward_pre_hook(_check_attention)
    decoder.rotary_emb.register_forward_pre_hook(encoder.shift_positions, with_kwargs=True)
    decoder.config._attn_implementation = EAGER_PREFIX
    for layer_idx, attention in enumerate(attentions):
        attention.prefix = PrefixSlice(encoder, layer_idx)

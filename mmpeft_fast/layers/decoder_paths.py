"""Where a decoder keeps its layers, norms and linear sites: the one description that a family gives of its shape."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn

# Roles of a LLaMA-shaped decoder layer, relative to the layer.
LLAMA_LAYER_ROLES: Mapping[str, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "input_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}


@dataclass(frozen=True, kw_only=True)
class DecoderPaths:
    """Dotted names of a decoder's parts; the defaults are LLaMA's, which most families share.

    Attributes:
        roles: path of each role's module below a layer. Either q, k, v or one `qkv`, whose output holds q, k, v side
            by side, as many columns each.
        layers, norm: the list of layers and the final norm, below the decoder.
        attention: what holds `head_dim` and a prefix, below a layer.
        activation: the MLP's activation module below a layer; None where the layer's class fixes it to SiLU.
    """

    roles: Mapping[str, str] = field(default_factory=lambda: LLAMA_LAYER_ROLES)
    layers: str = "layers"
    norm: str = "norm"
    attention: str = "self_attn"
    activation: str | None = "mlp.act_fn"

    @property
    def projections(self) -> tuple[str, ...]:
        """The roles that make queries, keys and values."""
        return ("qkv",) if "qkv" in self.roles else ("q", "k", "v")

    @functools.cached_property
    def containers(self) -> tuple[str, ...]:
        """Modules between a layer and its sites (attention, MLP)."""
        return tuple(dict.fromkeys(path.rpartition(".")[0] for path in self.roles.values() if "." in path))

    def container_role(self, path: str) -> str:
        """What the forward of a container is known as (`layers.known`)."""
        return "attention" if path == self.attention else "mlp"

    def layers_of(self, decoder: nn.Module) -> list[nn.Module]:
        return list(decoder.get_submodule(self.layers))

    def norm_of(self, decoder: nn.Module) -> nn.Module:
        return decoder.get_submodule(self.norm)

    def attention_of(self, layer: nn.Module) -> nn.Module:
        return getattr(layer, self.attention)

    def sites_in(self, layer: nn.Module) -> list[nn.Module]:
        """The modules that play a role in `layer`, as far as it has them."""
        named = dict(layer.named_modules())
        return [named[path] for path in self.roles.values() if path in named]

    def at(self, layer: nn.Module, role: str) -> nn.Module:
        """The module that plays `role` in `layer`."""
        return attrgetter(self.roles[role])(layer)

"""The blocks of Qwen-7B's decoder, as eager transformers modules.

    x += c_proj(attention(c_attn(ln_1(x))));  x += c_proj(w1(h) * silu(w2(h))), h = ln_2(x)

Rotary embedding (Su et al. 2021) with dynamic NTK and log-n scaled queries, as the published model has them.
"""

import math

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmpeft_fast.models.qwen_vl.configuration import QwenVLConfig
from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.norms import rms_norm_ref
from mmpeft_fast.ops.rotary import rotate


class QwenVLRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm_ref(hidden_states, self.weight, self.variance_epsilon)


class QwenVLRotaryEmbedding(nn.Module):
    """Rotation of whole heads, and the log-n scale of queries."""

    def __init__(self, dim: int, base: float):
        super().__init__()
        self.dim, self.base = dim, base

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        ntk_alpha: float = 1.0,
        columns: Tensor | None = None,
        logn_length: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines and sines [B, T, DH] in float32 whatever x's dtype (float64 for float64), as the publisher rotates;
        and with `columns` [1, T] the scales max(1, log_n(column + 1)) [1, T, 1] of the queries, n = `logn_length`. The
        publisher scales by the column in the padded batch, cached keys included, whatever the positions are.
        position_ids: [B, T]; ntk_alpha: the base is multiplied by alpha^(DH / (DH - 2))."""
        wide = accumulate_dtype(x.dtype)
        base = self.base * ntk_alpha ** (self.dim / (self.dim - 2))
        inv_freq = base ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=wide) / self.dim)
        angles = position_ids[..., None].to(wide) * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        scale = None
        if columns is not None:
            scale = (torch.log(columns[..., None].to(wide) + 1) / math.log(logn_length)).clamp(min=1.0)
        return angles.cos(), angles.sin(), scale


class QwenVLAttention(nn.Module):
    """Causal attention; `c_attn` gives q, k, v side by side."""

    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=True)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states, attention_mask, position_embeddings, query_scale=None, past_key_values=None, **kwargs
    ) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.c_attn(hidden_states).chunk(3, -1)
        )
        cos, sin = (part.unsqueeze(1) for part in position_embeddings)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if query_scale is not None:
            q = (q * query_scale.unsqueeze(1)).to(q.dtype)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _plain_attention)
        out, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.c_proj(out.flatten(-2))


def _plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """transformers' attention interface by matrix products: [B, H, T, DH] in, [B, T, H, DH] and the weights out."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=accumulate_dtype(query.dtype)).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class QwenVLMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x)))."""

    def __init__(self, config: QwenVLConfig):
        super().__init__()
        inner = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, inner, bias=False)
        self.w2 = nn.Linear(config.hidden_size, inner, bias=False)
        self.c_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class QwenVLDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: QwenVLConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QwenVLAttention(config, layer_idx)
        self.ln_2 = QwenVLRMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QwenVLMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """hidden_states [B, T, H]; keywords as `QwenVLAttention.forward` takes them."""
        x = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)
        return x + self.mlp(self.ln_2(x))

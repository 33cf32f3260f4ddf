"""Qwen-VL's vision tower, a ViT-bigG at 448 pixels, and its resampler: one cross-attention of learned queries.

Facts: Bai et al. 2023, section 2.1, and the published checkpoint's tensors, whose names the modules keep.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention
from transformers.modeling_layers import GradientCheckpointingLayer

from mmpeft_fast.models.qwen_vl.configuration import QwenVLVisionConfig
from mmpeft_fast.ops.activations import accumulate_dtype

_EPS = 1e-6
_POSITIONS_SIDE = 16  # the tower was trained on 16 x 16 patches


def sincos_positions(width: int, side: int) -> Tensor:
    """Fixed positions of a square grid, [side^2, width] float32: the first half of the columns for the horizontal axis,
    the second for the vertical one; each half sines then cosines of frequencies 10000^(-i / (width / 4))."""
    num_frequencies = width // 4
    frequencies = 10000.0 ** (-torch.arange(num_frequencies, dtype=torch.float64, device="cpu") / num_frequencies)
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * frequencies
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # [side, width / 2]
    horizontal = axis[None].expand(side, side, -1)
    vertical = axis[:, None].expand(side, side, -1)
    return torch.cat((horizontal, vertical), dim=-1).flatten(0, 1).float()


def resized_positions(positions: Tensor, side: int) -> Tensor:
    """Positions [S^2, W] of a square grid, bicubically resized to [side^2, W] where they are not of that side."""
    source = round(positions.shape[0] ** 0.5)
    if source == side:
        return positions
    grid = positions.to(accumulate_dtype(positions.dtype)).unflatten(0, (source, source)).permute(2, 0, 1)[None]
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


class QwenVLVisionAttention(nn.Module):
    """Self-attention whose `in_proj` rows are q, k, v of one head after the other."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.in_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        return self.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class QwenVLVisionMLP(nn.Module):
    """c_proj(gelu(c_fc(x))), exact GELU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class QwenVLVisionBlock(GradientCheckpointingLayer):
    """A pre-norm block."""

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, eps=_EPS)
        self.ln_2 = nn.LayerNorm(config.width, eps=_EPS)
        self.attn = QwenVLVisionAttention(config.width, config.heads)
        self.mlp = QwenVLVisionMLP(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class QwenVLVisionTransformer(nn.Module):
    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.resblocks = nn.ModuleList(QwenVLVisionBlock(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class QwenVLResampler(nn.Module):
    """Learned queries attend to all patches; fixed 2-D positions are added to queries and keys, not to values."""

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        width, num_queries = config.output_dim, config.num_queries
        self.pos_embed = nn.Parameter(torch.empty(num_queries, width), requires_grad=False)
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.kv_proj = nn.Linear(config.width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, width // 128, batch_first=True)
        self.ln_q = nn.LayerNorm(width, eps=_EPS)
        self.ln_kv = nn.LayerNorm(width, eps=_EPS)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [B, P, width], P a square -> [B, num_queries, output_dim]."""
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + resized_positions(self.pos_embed, round(patches.shape[1] ** 0.5))
        queries = (self.ln_q(self.query) + self.pos_embed).expand(patches.shape[0], -1, -1)
        return self.attn(queries, keys, values, need_weights=False)[0]


class QwenVLVision(nn.Module):
    """Image to features: tower, resampler, norm and projection."""

    def __init__(self, config: QwenVLVisionConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(_POSITIONS_SIDE**2, config.width))
        self.ln_pre = nn.LayerNorm(config.width, eps=_EPS)
        self.transformer = QwenVLVisionTransformer(config)
        self.attn_pool = QwenVLResampler(config)
        self.ln_post = nn.LayerNorm(config.output_dim, eps=_EPS)
        self.proj = nn.Parameter(torch.empty(config.output_dim, config.output_dim))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S], normalised, any float dtype -> features [B, num_queries, output_dim].

        Raises:
            ValueError: another shape.
        """
        size = self.config.image_size
        if pixel_values.dim() != 4 or pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"Qwen-VL: expected pixel_values [images, 3, {size}, {size}], got {list(pixel_values.shape)}"
            )
        patches = self.conv1(pixel_values.to(self.conv1.weight.dtype))
        side = patches.shape[-1]
        x = patches.flatten(2).transpose(1, 2) + resized_positions(self.positional_embedding, side)
        x = self.attn_pool(self.transformer(self.ln_pre(x)))
        return self.ln_post(x) @ self.proj

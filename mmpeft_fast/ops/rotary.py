"""Rotary position embedding (Su et al. 2021, eq. 34, rotate-half layout) and its multimodal form, mRoPE.

    y = x * cos + rotate_half(x) * sin,  rotate_half([x1, x2]) = [-x2, x1]

mRoPE (Wang et al. 2024, Qwen2-VL, section 2.1) has three positions a token (time, height, width); each frequency
follows one of them, in blocks of `sections` (Qwen2-VL, Qwen2.5-VL) or interleaved (Qwen3-VL).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [..., DH]; cos, sin broadcast to x. Differentiable plain torch.

    Wider tables (float32 for x in bf16) rotate in their dtype; the result is rounded to x's once.
    """
    half = x.shape[-1] // 2
    return (x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin).to(x.dtype)


def rotate_backward(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `rotate`: dx [..., DH] from dy."""
    half = dy.shape[-1] // 2
    through_sin = dy * sin
    return (dy * cos + torch.cat((through_sin[..., half:], -through_sin[..., :half]), dim=-1)).to(dy.dtype)


def rotary_cos_sin(
    positions: Tensor,
    inv_freq: Tensor,
    *,
    sections: Sequence[int] | None = None,
    interleaved: bool = False,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles.

    Args:
        positions: [B, T], or [3, B, T] (time, height, width) for mRoPE.
        inv_freq: [DH / 2] inverse frequencies.
        sections: mRoPE's three section sizes, which sum to DH / 2; required for three-row positions.
        interleaved: Qwen3-VL's order (t, h, w, t, h, w, ...) instead of one block a section.
        scaling: factor on both results (long-context rope variants).
        dtype: of the results; angles are computed in float32.

    Returns:
        cos, sin: [B, T, DH].

    Raises:
        ValueError: sections do not fit inv_freq, or are missing for three-row positions.
    """
    half = inv_freq.shape[0]
    if positions.dim() == 3 and (sections is None or len(sections) != 3 or sum(sections) != half):
        raise ValueError(f"rotary_cos_sin: three-row positions need three sections with sum {half}, got {sections}")
    angles = positions[..., None].float() * inv_freq.float()
    if positions.dim() == 3:
        axis = torch.zeros(half, dtype=torch.int64, device=inv_freq.device)
        if interleaved:
            for row in (1, 2):
                axis[row : sections[row] * 3 : 3] = row
        else:
            axis[sections[0] : sections[0] + sections[1]] = 1
            axis[sections[0] + sections[1] :] = 2
        angles = angles.gather(0, axis.expand(1, *angles.shape[1:])).squeeze(0)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

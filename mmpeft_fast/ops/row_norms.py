"""Row norms of a weight with a low-rank part (DoRA, Liu et al. 2024, eq. 5), without forming the sum.

|w + s u D|^2 = |w|^2 + 2 s (w D^T) u + s^2 u (D D^T) u^T  for each row w of W and u of U.
"""

import torch
from torch import Tensor

from mmpeft_fast.ops.activations import accumulate_dtype
from mmpeft_fast.ops.autocast import without_autocast


@torch.no_grad()
def row_norms(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Norms [N] of the rows of W + s U D, in at least float32; a constant to autograd.

    Args:
        weight: W [N, K].
        down, up: D [R, K] and U [N, R], of W's dtype or a wider one.
        scaling: s.
    """
    wide = accumulate_dtype(weight.dtype)
    with without_autocast(weight):
        along, up = (weight @ down.to(weight.dtype).t()).to(wide), up.to(wide)
        down = down.to(wide)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        squares += 2 * scaling * (along * up).sum(1) + scaling**2 * ((up @ (down @ down.t())) * up).sum(1)
    return squares.clamp_min_(0).sqrt_()  # rounding may leave a row that vanishes below zero

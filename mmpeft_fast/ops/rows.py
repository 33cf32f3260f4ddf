"""Taking positions out of every sample: y[b, c] = x[b, rows[b, c]]."""

from torch import Tensor


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x [B or 1, T, ...] at positions rows [B, C] int64: [B, C, ...]. Differentiable; lengths may be symbolic, which
    torch's `take_along_dim` makes numbers of."""
    others = x.shape[2:]
    index = rows.view(*rows.shape, *(1 for _ in others)).expand(*rows.shape, *others)
    return x.expand(rows.shape[0], *x.shape[1:]).gather(1, index)

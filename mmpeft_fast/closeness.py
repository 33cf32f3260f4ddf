"""What "equal" means: a result may be as far from the truth as plain PyTorch in the same dtype is."""

import torch
from torch import Tensor

# What a result may be off where eager happens to be exact: its own rounding to the dtype, and a chain of a dozen
# operations in the accumulation dtype.
_CHAIN_LENGTH = 12
# How much further than eager: two results as good as each other have errors that are equal only on average.
_FACTOR = 2
_TINY = 1e-30


def floor(dtype: torch.dtype) -> float:
    """The relative error that a result of this dtype may have whatever eager's is."""
    accumulate = torch.promote_types(dtype, torch.float32)
    return torch.finfo(dtype).eps / 2 + _CHAIN_LENGTH * torch.finfo(accumulate).eps


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64.

    Raises:
        ValueError: shapes differ.
    """
    if actual.shape != truth.shape:
        raise ValueError(f"relative_error: expected shape {list(truth.shape)}, got {list(actual.shape)}")
    actual, truth = actual.detach().double(), truth.detach().double()
    if truth.numel() == 0:
        return 0.0
    return (torch.linalg.vector_norm(actual - truth) / (torch.linalg.vector_norm(truth) + _TINY)).item()


def allowed_error(eager: Tensor, truth: Tensor, dtype: torch.dtype | None = None) -> float:
    """How far from `truth` (of a wider dtype) a result may be where eager's is `eager`. dtype: that of the activations
    where the result's is wider (gradients of float32 adapters in a bfloat16 model); the result's own when None."""
    return _FACTOR * relative_error(eager, truth) + floor(dtype or eager.dtype)


def allowed_in_double() -> float:
    """The same for float64 models of transformers, whose norms, rotations and logits are float32 all the same."""
    return 4 * floor(torch.float32)

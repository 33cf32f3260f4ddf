"""What "equal" means in these tests: a result may be as far from the truth as plain PyTorch in the same dtype is."""

import torch

# What a result may be off where eager happens to be exact: its own rounding to the dtype, and a chain of a dozen
# operations in the accumulation dtype.
_CHAIN_LENGTH = 12


def _floor(dtype: torch.dtype) -> float:
    accumulate = torch.promote_types(dtype, torch.float32)
    return torch.finfo(dtype).eps / 2 + _CHAIN_LENGTH * torch.finfo(accumulate).eps


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth, in float64."""
    actual, truth = actual.detach().double(), truth.detach().double()
    assert actual.shape == truth.shape, (actual.shape, truth.shape)
    if truth.numel() == 0:
        return 0.0
    return (torch.linalg.vector_norm(actual - truth) / (torch.linalg.vector_norm(truth) + 1e-30)).item()


def assert_as_close_as_eager(fused: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    """err(fused, truth) <= 2 err(eager, truth) + the floor; `truth` comes from a wider dtype."""
    allowed = 2 * relative_error(eager, truth) + _floor(eager.dtype)
    got = relative_error(fused, truth)
    assert got <= allowed, f"{what}: relative error {got:.2e}, allowed {allowed:.2e}"


def assert_exact(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal in float64 but for the order of operations; leaves a factor of 1000 for sums that cancel."""
    assert actual.dtype == expected.dtype == torch.float64
    got, allowed = relative_error(actual, expected), 1000 * _floor(torch.float64)
    assert got <= allowed, f"{what}: relative error {got:.2e}, allowed {allowed:.2e}"


def assert_same_in_double(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal in a float64 model of transformers, whose norms, rotations and logits are float32 all the same."""
    got, allowed = relative_error(actual, expected), 4 * _floor(torch.float32)
    assert got <= allowed, f"{what}: relative error {got:.2e}, allowed {allowed:.2e}"

"""Assertions of the package's rule for closeness (`mmpeft_fast.closeness`): a result may be as far from the truth as
plain PyTorch in the same dtype is."""

import torch

from mmpeft_fast.closeness import allowed_error, allowed_in_double, floor, relative_error

__all__ = ["assert_as_close_as_eager", "assert_exact", "assert_same_in_double", "relative_error"]


def assert_as_close_as_eager(fused: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    """err(fused, truth) <= 2 err(eager, truth) + the floor; `truth` comes from a wider dtype."""
    got, allowed = relative_error(fused, truth), allowed_error(eager, truth)
    assert got <= allowed, f"{what}: relative error {got:.2e}, allowed {allowed:.2e}"


def assert_exact(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal in float64 but for the order of operations; leaves a factor of 1000 for sums that cancel."""
    assert actual.dtype == expected.dtype == torch.float64
    got, allowed = relative_error(actual, expected), 1000 * floor(torch.float64)
    assert got <= allowed, f"{what}: relative error {got:.2e}, allowed {allowed:.2e}"


def assert_same_in_double(actual: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """Equal in a float64 model of transformers, whose norms, rotations and logits are float32 all the same."""
    got, allowed = relative_error(actual, expected), allowed_in_double()
    assert got <= allowed, f"{what}: relative error {got:.2e}, allowed {allowed:.2e}"

"""Activations of bottleneck branches and their derivatives: z = f(a), da = dz * f'(a)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype elementwise arithmetic runs in: float32 for half precisions, the input's own otherwise."""
    return torch.promote_types(dtype, torch.float32)


def _silu_derivative(a: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(a)
    return sigmoid * (1 + a * (1 - sigmoid))


def _gelu_derivative(a: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(a * math.sqrt(0.5)))
    return cdf + a * torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)


class Activation(NamedTuple):
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]  # f'(a), computed in the accumulation dtype


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(lambda a: a, torch.ones_like),
    "tanh": Activation(torch.tanh, lambda a: 1 - torch.tanh(a) ** 2),
    "relu": Activation(torch.relu, lambda a: (a > 0).to(a.dtype)),
    "gelu": Activation(torch.nn.functional.gelu, _gelu_derivative),
    "silu": Activation(torch.nn.functional.silu, _silu_derivative),
}


def activation_backward(name: str, dz: Tensor, a: Tensor) -> Tensor:
    """`dz * f'(a)` in dz's dtype; a, dz: [M, R]."""
    if name == "identity":
        return dz
    wide = accumulate_dtype(a.dtype)
    return (dz.to(wide) * ACTIVATIONS[name].derivative(a.to(wide))).to(dz.dtype)

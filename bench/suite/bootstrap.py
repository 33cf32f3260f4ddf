"""Intervals of ratios of medians, by resampling rounds (Efron & Tibshirani 1993, percentile intervals)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_DRAWS = 2000
# Wide, because a comparison looks at many ratios at once.
_CONFIDENCE = 0.99


class Ratio(NamedTuple):
    value: float
    interval: tuple[float, float]


def ratio_of(times: Sequence[float], others: Sequence[float]) -> Ratio:
    """Median over median of rounds that took turns, resampled together."""
    return _ratio(_ratio_draws(times, others, seed=0), _medians(times) / _medians(others))


def ratio_of_ratios(
    old: tuple[Sequence[float], Sequence[float]], new: tuple[Sequence[float], Sequence[float]]
) -> Ratio:
    """What (times, yardstick's times) of a new run are to those of an old one: medians over medians, runs resampled
    apart, rounds of a run together."""
    draws = _ratio_draws(*new, seed=0) / _ratio_draws(*old, seed=1)
    return _ratio(draws, _medians(new[0]) / _medians(new[1]) / (_medians(old[0]) / _medians(old[1])))


def _ratio(draws: Tensor, value: Tensor) -> Ratio:
    tail = (1 - _CONFIDENCE) / 2
    low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
    return Ratio(value.item(), (low, high))


def _medians(times: Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(times, dtype=torch.float64).quantile(0.5, dim=-1)


def _ratio_draws(times: Sequence[float], others: Sequence[float], seed: int) -> Tensor:
    count = min(len(times), len(others))
    chosen = torch.randint(count, (_DRAWS, count), generator=torch.Generator().manual_seed(seed))
    first, second = (torch.tensor(values[:count], dtype=torch.float64)[chosen] for values in (times, others))
    return _medians(first) / _medians(second)

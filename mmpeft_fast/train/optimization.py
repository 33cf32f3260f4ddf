"""AdamW over what is trained, and the cosine schedule with linear warm-up."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup


def build_optimizer(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    connector_parameters: Iterable[nn.Parameter] = (),
    connector_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters only.

    Matrices get weight decay; norms, scales, biases and vectors stored as one row or column do not. Trainable
    parameters among connector_parameters get connector_learning_rate, if given. Raises ValueError if nothing is
    trainable.
    """
    connector = {id(parameter) for parameter in connector_parameters if connector_learning_rate is not None}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group_learning_rate = connector_learning_rate if id(parameter) in connector else learning_rate
            group_weight_decay = weight_decay if _is_matrix(parameter) else 0.0
            groups.setdefault((group_learning_rate, group_weight_decay), []).append(parameter)
    if not groups:
        raise ValueError("model: expected at least one trainable parameter, all are frozen")
    return torch.optim.AdamW(
        [{"params": parameters, "lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()],
        betas=betas,
        eps=epsilon,
        # On a GPU one kernel for each few hundred tensors, where torch's default takes a pass for each operation.
        fused=True if all(p.device.type == "cuda" for group in groups.values() for p in group) else None,
    )


def cosine_with_warmup(optimizer: torch.optim.Optimizer, *, steps: int, warmup_ratio: float) -> LambdaLR:
    """transformers' cosine decay to 0 over so many steps, after a linear warm-up of ceil(steps * warmup_ratio)."""
    return get_cosine_schedule_with_warmup(optimizer, math.ceil(steps * warmup_ratio), steps)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return sum(size > 1 for size in parameter.shape) >= 2

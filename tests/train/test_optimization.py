import math

import pytest
import torch
from torch import nn

from mmpeft_fast.train import build_optimizer, cosine_with_warmup


def model_with(**shapes):
    model = nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.ones(shape)))
    return model


def test_decay_only_on_matrices_and_connector_has_its_own_rate():
    model = model_with(matrix=(4, 3), gain=(3,), scale=(1, 3), column=(3, 1), frozen=(3, 3), connector=(2, 2))
    model.frozen.requires_grad_(False)
    optimizer = build_optimizer(
        model,
        learning_rate=1.0,
        weight_decay=0.1,
        connector_parameters=[model.connector, model.frozen],
        connector_learning_rate=0.5,
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        (group["lr"], group["weight_decay"]): {names[id(parameter)] for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    assert groups == {(1.0, 0.1): {"matrix"}, (1.0, 0.0): {"gain", "scale", "column"}, (0.5, 0.1): {"connector"}}


def test_all_frozen_is_an_error():
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        build_optimizer(model_with(w=(2, 2)).requires_grad_(False), learning_rate=1.0)


def test_schedule_rises_linearly_then_falls_as_a_cosine():
    optimizer = build_optimizer(model_with(w=(2, 2)), learning_rate=1.0)
    schedule = cosine_with_warmup(optimizer, steps=10, warmup_ratio=0.15)  # 2 steps of warm-up
    rates = []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[2:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])

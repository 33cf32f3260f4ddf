import math

import pytest

from mmpeft_fast.methods import METHODS
from mmpeft_fast.train import TrainConfig


def test_defaults_are_the_studys():
    config = TrainConfig.for_study("adapter", "llava")
    assert (config.learning_rate, config.connector_learning_rate, config.warmup_ratio) == (5e-5, 2e-5, 0.03)
    assert (config.global_batch_size, config.epochs, config.seed, config.weight_decay) == (128, 3, 42, 0.0)
    qwen = TrainConfig.for_study("lora", "qwen2_vl", warmup_ratio=0.05)
    assert (qwen.learning_rate, qwen.connector_learning_rate, qwen.beta2) == (2e-4, 1e-5, 0.95)
    assert (qwen.weight_decay, qwen.warmup_ratio) == (0.1, 0.05)


def test_learning_rates_are_the_methods_own():
    rates = {name: TrainConfig.for_study(name, "llava").learning_rate for name in METHODS}
    assert rates == dict.fromkeys(METHODS, 2e-4) | {"adapter": 5e-5, "prefix": 1e-5, "vera": 2e-3}


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("learning_rate", 0.0, "a number above 0, got 0.0"),
        ("learning_rate", math.nan, "a number above 0, got nan"),
        ("weight_decay", -1, "a number of at least 0, got -1"),
        ("warmup_ratio", 1, "a number of at least 0 and below 1, got 1"),
        ("batch_size", 2.0, "an integer of at least 1, got 2.0"),
        ("max_steps", 0, "an integer of at least 1 or none, got 0"),
        ("max_steps", 10**20, "an integer of at least 1 or none, got 100000000000000000000"),
        ("seed", True, "an integer of 0 to 4294967295, got True"),
        ("seed", 2**32, "an integer of 0 to 4294967295, got 4294967296"),
        ("gradient_checkpointing", "no", "true or false, got 'no'"),
        ("tracker", None, "a text, got None"),
        ("global_batch_size", 24, "a multiple of batch_size 16, got 24"),
    ],
)
def test_bad_values_are_named(field, value, expected):
    with pytest.raises(ValueError, match=f"{field}: expected {expected}"):
        TrainConfig(**{field: value})


def test_unknown_names():
    with pytest.raises(ValueError, match=r"unknown method 'lara'"):
        TrainConfig.for_study("lara", "llava")
    with pytest.raises(ValueError, match="expected fields of TrainConfig, got lr"):
        TrainConfig.for_study("lora", "llava", lr=1.0)

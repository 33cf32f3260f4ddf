"""Merging asks a branch whether it is linear, not a method for its name."""

import pytest
import torch

from mmpeft_fast import Adapter, add_peft, fuse, is_fused, merge_peft
from tests.closeness import assert_same_in_double
from tests.tiny_models import randomize_trainable, tiny_batch, tiny_model


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"activation": "silu", "placement": "parallel"}, "silu makes it nonlinear"),
        ({"activation": "tanh"}, "tanh makes it nonlinear"),
        ({"activation": "identity", "targets": ("q",)}, "its position is 'pre'"),
        ({"activation": "identity", "targets": ("down",)}, "its position is 'post'"),
    ],
)
def test_nonlinear_branches_are_refused(settings, message):
    model = fuse(add_peft(tiny_model("llama", num_layers=1), Adapter(bottleneck=3, **settings)))
    randomize_trainable(model)
    with pytest.raises(ValueError, match=message):
        merge_peft(model)
    assert is_fused(model)


def test_a_linear_parallel_branch_is_folded_whatever_its_method():
    model = add_peft(
        tiny_model("llama", num_layers=1, dtype=torch.float64),
        Adapter(bottleneck=3, activation="identity", placement="parallel", dropout=0.0, scaling=0.5),
    )
    randomize_trainable(model)
    batch = {name: value for name, value in tiny_batch("llama").items() if name != "labels"}
    with torch.no_grad():
        expected = model.double().eval()(**batch).logits
        merged = merge_peft(fuse(model))(**batch).logits
    assert_same_in_double(merged, expected)

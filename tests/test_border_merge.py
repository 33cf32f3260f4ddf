"""Merging asks a branch whether it is linear, not a method for its name."""

import pytest

from mmpeft_fast import Adapter, add_peft, fuse, is_fused, merge_peft
from tests.tiny_models import randomize_trainable, tiny_model


@pytest.mark.parametrize(
    "settings, message",
    [({"activation": "silu"}, "silu makes it nonlinear"), ({"activation": "tanh"}, "tanh makes it nonlinear")],
)
def test_nonlinear_branches_are_refused(settings, message):
    model = fuse(add_peft(tiny_model("llama", num_layers=1), Adapter(bottleneck=3, **settings)))
    randomize_trainable(model)
    with pytest.raises(ValueError, match=message):
        merge_peft(model)
    assert is_fused(model)

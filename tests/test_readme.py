"""What the README shows as code runs."""

import re
from pathlib import Path

import pytest
import torch

from mmpeft_fast import METHODS, add_peft, fuse, fuse_report, merge_peft, unfuse
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

_README = Path(__file__).parents[1] / "README.md"


def _code_after(heading: str) -> str:
    text = _README.read_text().split(f"\n## {heading}\n")[1]
    return re.search(r"```python\n(.*?)```", text, re.S)[1]


@pytest.fixture
def parallel_mlp():
    before, names = dict(METHODS), {"__name__": __name__}
    exec(_code_after("Add a method"), names)
    yield names["ParallelMLP"]
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize("family", ["llama", "qwen_vl"])
def test_the_method_works_eagerly_and_fused(parallel_mlp, family):
    model = add_peft(tiny_model(family, dtype=torch.float64), parallel_mlp(rank=3))
    randomize_trainable(model)
    batch = tiny_batch(family, dtype=torch.float64)
    expected, grads = loss_and_grads(model.double().train(), batch)
    fuse(model)
    assert not fuse_report(model).kept
    loss, got = loss_and_grads(model, batch)
    assert_same_in_double(loss, expected)
    assert len(grads) == 2 * 3 * 2 and got.keys() == grads.keys()
    for name, grad in grads.items():
        assert_same_in_double(got[name], grad, name)
    unfuse(model)


def test_the_method_is_not_merged(parallel_mlp):
    model = add_peft(tiny_model("llama", num_layers=1), parallel_mlp(rank=3))
    with pytest.raises(ValueError, match="silu makes it nonlinear"):
        merge_peft(model)


def test_a_wrong_setting_is_one_sentence(parallel_mlp):
    with pytest.raises(ValueError, match=r"ParallelMLP\.rank: expected an integer of 1 to 65536, got 0"):
        parallel_mlp(rank=0)

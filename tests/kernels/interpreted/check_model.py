"""Whole fused models on the Triton provider: loss and every gradient of every method against the torch provider."""

import pytest
import torch

from bench import step
from mmpeft_fast import add_peft, fuse, make_method, provider
from tests.tiny_models import loss_and_grads, randomize_trainable

SETTINGS = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "ia3": {},
    "adapter": {"bottleneck": 8, "dropout": 0.1},
    "prefix": {"num_virtual_tokens": 3},
    "layernorm-simp": {},
}
SMALL = "--hidden 32 --intermediate 40 --layers 2 --heads 2 --kv-heads 1 --vocab 50 --seq-len 18 --supervised 0.3"


@pytest.mark.parametrize("method", SETTINGS)
def test_step(method):
    args = step.parse(SMALL.split())
    model = fuse(add_peft(step.decoder(args), make_method(method, **SETTINGS[method])))
    randomize_trainable(model)
    model.train()
    results = []
    for name in ("torch", "triton"):
        torch.manual_seed(3)
        with provider(name):
            results.append(loss_and_grads(model, step.inputs(args)))
    (loss, grads), (got_loss, got_grads) = results
    torch.testing.assert_close(got_loss, loss)
    assert got_grads.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(got_grads[name], grad, msg=lambda text, name=name: f"{name}: {text}")

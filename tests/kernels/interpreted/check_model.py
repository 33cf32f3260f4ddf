"""Whole fused models on the Triton provider: loss and every gradient of every method against the torch provider."""

import pytest
import torch

from bench import step
from mmpeft_fast import add_peft, fuse, make_method, provider
from mmpeft_fast.ops import tape
from tests.tiny_models import loss_and_grads, randomize_trainable

SETTINGS = {
    "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "ia3": {},
    "adapter": {"bottleneck": 8, "dropout": 0.1},
    "prefix": {"num_virtual_tokens": 3},
    "layernorm-simp": {},
    "lora-fa": {"r": 4, "alpha": 8, "dropout": 0.1},
    "dora": {"r": 4, "alpha": 8, "dropout": 0.1},
    "vera": {"r": 5, "dropout": 0.1},
    "moelora": {"r": 4, "experts": 2, "dropout": 0.1},
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


@pytest.mark.parametrize("method", ("lora", "ia3", "prefix"))
def test_tapes_change_no_bit(method):
    """Steps of two lengths, the last of which run from tapes, against steps without any."""
    model = fuse(add_peft(step.decoder(step.parse(SMALL.split())), make_method(method, **SETTINGS[method])))
    randomize_trainable(model)
    model.train()
    batches = [
        step.inputs(step.parse([*SMALL.split(), "--seq-len", length, "--seed", str(seed)]))
        for seed, length in enumerate(("18", "11", "18", "18"))
    ]

    def run():
        torch.manual_seed(3)
        with provider("triton"):
            return [loss_and_grads(model, batch) for batch in batches]

    tape.forget()
    taped, recorded = run(), sum(map(callable, tape._tapes.values()))
    with tape.no_tapes():
        plain = run()
    assert recorded > 10
    for (loss, grads), (got_loss, got_grads) in zip(plain, taped, strict=True):
        assert torch.equal(got_loss, loss)
        assert all(torch.equal(got_grads[name], grad) for name, grad in grads.items())

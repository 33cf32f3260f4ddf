"""A call that asks for attention weights runs unfused, says so once, and is the last to do so."""

import logging

import peft
import pytest
import torch

from mmpeft_fast import LoRA, add_peft, fuse
from mmpeft_fast.layers import decoder
from mmpeft_fast.models import FAMILIES
from tests.closeness import assert_same_in_double
from tests.tiny_models import TEXT_FAMILIES, randomize_trainable, tiny_batch, tiny_model, token_id

# Qwen-VL keeps no attention weights, fused or not.
WITH_ATTENTIONS = [name for name in FAMILIES if name != "qwen_vl"]


@pytest.fixture
def fused_calls(monkeypatch):
    """One entry for every fused linear of a decoder layer."""
    seen, op = [], decoder.fused_linear
    monkeypatch.setattr(decoder, "fused_linear", lambda *args, **kwargs: seen.append(1) or op(*args, **kwargs))
    return seen


def eager_model(family):
    model = tiny_model(family, dtype=torch.float64)
    model.set_attn_implementation("eager")
    add_peft(model, LoRA(r=2, dropout=0.0))
    randomize_trainable(model)
    return model


def step(model, batch, **options):
    model.zero_grad()
    output = model(**batch, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_call(actual, expected):
    (output, grads), (wanted, wanted_grads) = actual, expected
    assert output.keys() == wanted.keys() and len(output.attentions) == len(wanted.attentions)
    for name in ("loss", "logits"):
        assert_same_in_double(output[name], wanted[name], name)
    for weights, wanted_weights in zip(output.attentions, wanted.attentions, strict=True):
        assert_same_in_double(weights, wanted_weights, "attentions")
    assert grads.keys() == wanted_grads.keys()
    for name, grad in grads.items():
        assert_same_in_double(grad, wanted_grads[name], name)


@pytest.mark.parametrize("by", ["argument", "configuration"])
@pytest.mark.parametrize("family", WITH_ATTENTIONS)
def test_attentions_as_unfused(family, by, fused_calls, caplog):
    model, batch = eager_model(family).train(), tiny_batch(family, dtype=torch.float64)
    options = {"output_attentions": True} if by == "argument" else {}
    config = model.config.get_text_config()
    config.output_attentions = by == "configuration"
    expected = step(model, batch, use_cache=False, **options)
    fuse(model)
    with caplog.at_level(logging.WARNING, logger="mmpeft_fast"):
        for _ in range(2):
            assert_same_call(step(model, batch, use_cache=False, **options), expected)
    assert not fused_calls and all(weights is not None for weights in expected[0].attentions)
    assert [record.message for record in caplog.records] == [
        "all layers run unfused: attentions are asked for, which the fused layer does not compute"
    ]
    config.output_attentions = False
    output, _ = step(model, batch)
    assert len(fused_calls) >= 4 * config.num_hidden_layers and output.logits is None and len(caplog.records) == 1
    assert_same_in_double(
        output.loss, expected[0].loss
    )  # gradients: test_parity, as eager attention has float32 inside


@pytest.mark.parametrize("family", ["llama", "llava"])
@pytest.mark.parametrize("search", [{"num_beams": 3}, {"do_sample": False}, "assisted"], ids=str)
def test_attentions_of_generation(family, search, fused_calls):
    batch = {key: value for key, value in tiny_batch(family, batch_size=1).items() if key != "labels"}
    results = []
    for prepare in (lambda model: model, fuse):
        model, helper = (tiny_model(family, seed=seed).eval() for seed in (0, 1))
        for each in (model, helper):
            each.set_attn_implementation("eager")
            prepare(each)
        options = {"assistant_model": helper} if search == "assisted" else search
        found = model.generate(
            **batch, **options, max_new_tokens=4, output_attentions=True, return_dict_in_generate=True,
            pad_token_id=token_id("<pad>"), eos_token_id=None,
        )  # fmt: skip
        results.append((found.sequences, [weights for step in found.attentions for weights in step]))
    (expected, expected_attentions), (sequences, attentions) = results
    assert torch.equal(sequences, expected) and len(attentions) == len(expected_attentions) > 0
    for weights, wanted in zip(attentions, expected_attentions, strict=True):
        torch.testing.assert_close(weights, wanted)


def test_attentions_with_the_prefix_of_hf_peft(fused_calls):
    model = tiny_model("llama", dtype=torch.float64)
    model.set_attn_implementation("eager")
    model = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    randomize_trainable(model)
    batch = tiny_batch("llama")
    expected = step(model.train(), batch, output_attentions=True)
    assert_same_call(step(fuse(model), batch, output_attentions=True), expected)
    assert not fused_calls
    output, _ = step(model, batch)
    assert_same_in_double(output.loss, expected[0].loss)
    assert fused_calls


def test_every_family_is_here():
    assert set(TEXT_FAMILIES) < set(WITH_ATTENTIONS)

"""A prefix of HF PEFT belongs to the calls of its PeftModel, and to no other call of the modules below it."""

import itertools

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from torch import nn

from mmpeft_fast import Prefix, add_peft, fuse
from mmpeft_fast.closeness import allowed_in_double
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

BATCH = tiny_batch("llama")


def prefixed(*, projection=False, training=True):
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=16
    )
    model = get_peft_model(tiny_model("llama", dtype=torch.float64), config)
    randomize_trainable(model)
    return model.double().train(training)


def checkpoint(model, reentrant):
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    base.enable_input_require_grads()


def losses(model, batch, reentrant):
    """An ordinary call, three without the prefix, an ordinary one; each with its backward."""
    found, base = [], model.get_base_model()

    def step(call):
        model.zero_grad()
        loss = call(**batch).loss
        if loss.requires_grad:
            loss.backward()
        found.append(loss.detach())

    step(model)
    if reentrant is not None:
        checkpoint(model, reentrant)
    with model.disable_adapter():
        step(model)
    step(base)
    step(model.base_model)
    base.gradient_checkpointing_disable()
    step(model)
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("projection, training", itertools.product((False, True), repeat=2))
def test_calls_without_the_prefix_see_none(projection, training, reentrant):
    for use_cache in (None, False, True):
        batch = BATCH | ({} if use_cache is None else {"use_cache": use_cache})
        models = [prefixed(projection=projection, training=training) for _ in range(2)]
        expected = losses(models[0], batch, reentrant)
        allowed = allowed_in_double() * abs(expected[1])
        assert abs(expected[0] - expected[1]) > 4 * allowed, "the prefix changes nothing that a comparison would see"
        for got, loss in zip(losses(fuse(models[1]), batch, reentrant), expected, strict=True):
            assert_same_in_double(got, loss)


@pytest.mark.parametrize("projection", [False, True])
def test_gradients_reach_the_prefix_under_checkpointing(projection):
    """HF PEFT loses the prefix there; the fused pass is compared with itself without checkpointing."""
    expected = loss_and_grads(fuse(prefixed(projection=projection)), BATCH)
    model = fuse(prefixed(projection=projection))
    checkpoint(model, False)
    loss, grads = loss_and_grads(model, BATCH)
    assert_same_in_double(loss, expected[0])
    assert grads.keys() == expected[1].keys()
    for name, grad in grads.items():
        assert_same_in_double(grad, expected[1][name], name)


def test_two_calls_before_their_backwards():
    model = fuse(prefixed(projection=True))
    other = tiny_batch("llama", seed=7)
    expected = [loss_and_grads(model, batch)[1] for batch in (BATCH, other)]
    model.zero_grad()
    checkpoint(model, False)
    loss_of = [model(**batch).loss for batch in (BATCH, other)]
    for loss in loss_of:
        loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_same_in_double(parameter.grad, expected[0][name] + expected[1][name], name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", ["positions", "cache", "layer", "hook", "adapter"])
def test_what_the_fused_pass_does_not_know_goes_through_hf_pefts_cache(change, training):
    batch = dict(BATCH)
    if change == "positions":
        batch["position_ids"] = torch.arange(30).flip(0).expand(3, 30)
    if change == "cache":
        batch["use_cache"] = True

    def run(is_fused):
        model = prefixed(training=training)
        if is_fused:
            loss_and_grads(fuse(model), BATCH)
        layers = model.get_base_model().model.layers
        if change == "layer":
            fresh = type(tiny_model("llama").model.layers[1])(model.get_base_model().config, 1).double()
            fresh.load_state_dict(layers[1].state_dict())
            layers[1] = fresh.requires_grad_(False).train(training)
        if change == "hook":
            layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)
        if change == "adapter":
            config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
            model.add_adapter("other", config)
            nn.init.normal_(model.prompt_encoder["other"].embedding.weight, generator=torch.Generator().manual_seed(1))
            model.double().set_adapter("other")
        out = model(**batch)
        return out.loss.detach(), out.past_key_values, loss_and_grads(model, batch)[1]

    (loss, cache, grads), (got, ours, fused) = run(False), run(True)
    assert_same_in_double(got, loss)
    assert fused.keys() == grads.keys()
    for name, grad in grads.items():
        assert_same_in_double(fused[name], grad, name)
    if not training or change == "cache":
        assert ours.get_seq_length() == cache.get_seq_length()


@pytest.mark.filterwarnings("ignore")
def test_a_prefix_over_a_model_whose_head_is_not_fused():
    def outcome(is_fused):
        model = prefixed()
        model.get_base_model().loss_function = lambda logits, labels, **_: logits.float().square().mean()
        return loss_and_grads(fuse(model) if is_fused else model, BATCH)

    (loss, grads), (expected, truth) = outcome(True), outcome(False)
    assert_same_in_double(loss.double(), expected.double())
    for name, grad in truth.items():
        assert_same_in_double(grads[name], grad, name)


@pytest.mark.parametrize("is_fused", [True, False])
def test_attention_that_does_not_see_the_prefix_of_add_peft_is_an_error(is_fused):
    model = add_peft(tiny_model("llama"), Prefix(num_virtual_tokens=3))
    if is_fused:
        fuse(model)
    loss_and_grads(model, BATCH)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="'sdpa' does not see the prefix"):
        model(**BATCH)


@pytest.mark.filterwarnings("ignore")
def test_a_forward_above_the_layers_that_reads_the_cache():
    def outcome(is_fused):
        model = prefixed()
        model = fuse(model) if is_fused else model
        base = model.get_base_model()
        forward = base.forward

        def with_a_term(*args, past_key_values=None, **kwargs):
            output = forward(*args, past_key_values=past_key_values, **kwargs)
            output.loss = output.loss + past_key_values.get_seq_length()
            return output

        base.forward = with_a_term
        return loss_and_grads(model, BATCH)

    (loss, grads), (expected, truth) = outcome(True), outcome(False)
    assert_same_in_double(loss.double(), expected.double())
    for name, grad in truth.items():
        assert_same_in_double(grads[name], grad, name)


def test_layers_in_another_order_take_their_prefix_along():
    expected, got = prefixed(), prefixed()
    for model in (expected, got):
        layers = model.get_base_model().model.layers
        layers[0], layers[1] = layers[1], layers[0]
    loss, grads = loss_and_grads(expected, BATCH)
    fused_loss, fused_grads = loss_and_grads(fuse(got), BATCH)
    assert_same_in_double(fused_loss, loss)
    for name, grad in grads.items():
        assert_same_in_double(fused_grads[name], grad, name)

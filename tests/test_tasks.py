"""Branches whose experts a sample's task weights: which task reaches which sample, and where that is kept."""

import copy

import pytest
import torch

from mmpeft_fast import MOELoRA, add_peft, fuse, load_peft, merge_peft, save_peft, unfuse
from tests.closeness import assert_same_in_double
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

METHOD = MOELoRA(r=6, experts=3, alpha=12, num_tasks=4, task_width=5, dropout=0.0)


def model_of(family="llama", method=METHOD):
    model = add_peft(tiny_model(family, dtype=torch.float64), method)
    randomize_trainable(model)
    return model.double().train()


def with_tasks(family, *tasks):
    return tiny_batch(family, dtype=torch.float64) | {"task_ids": torch.tensor(tasks)}


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl"])
def test_every_sample_has_its_tasks_weights(family):
    """Loss and every gradient as eagerly; a sample's logits are those of a model that knows its task alone."""
    model, batch = model_of(family), with_tasks(family, 2, 0, 3)
    loss, grads = loss_and_grads(model, batch)
    embedding = next(grad for name, grad in grads.items() if "task_embedding" in name)
    assert (embedding.abs().sum(1) > 0).tolist() == [True, False, True, True]
    logits = {}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        for fused in (False, True):
            logits[fused] = (fuse(model) if fused else model)(**inputs).logits
        tasks = model.get_decoder().task_embedding
        plain = {name: value for name, value in inputs.items() if name != "task_ids"}
        for sample, task in enumerate((2, 0, 3)):
            tasks.default_task = task
            assert_same_in_double(model(**plain).logits[sample], logits[False][sample])
        tasks.default_task = 0
    assert_same_in_double(logits[True], logits[False])
    fused_loss, fused_grads = loss_and_grads(model, batch)
    assert_same_in_double(fused_loss, loss)
    for name, grad in grads.items():
        assert_same_in_double(fused_grads[name], grad, name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_layers_compute_the_same_again(use_reentrant):
    model, batch = model_of(), with_tasks("llama", 1, 1, 2)
    expected = loss_and_grads(model, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for each in (model, fuse(model)):
        loss, grads = loss_and_grads(each, batch)
        assert_same_in_double(loss, expected[0])
        for name, grad in expected[1].items():
            assert_same_in_double(grads[name], grad, name)


def test_a_call_without_tasks_does_not_remember_the_last_ones():
    model = fuse(model_of()).eval()
    plain = tiny_batch("llama")
    with torch.no_grad():
        expected = model(**plain).loss
        assert not torch.equal(model(**plain, task_ids=torch.tensor([3, 3, 3])).loss, expected)
        assert torch.equal(model(**plain).loss, expected)


def test_it_is_saved_loaded_and_copied(tmp_path):
    model, batch = model_of(), with_tasks("llama", 2, 0, 3)
    save_peft(fuse(model), tmp_path)
    loaded = load_peft(tiny_model("llama", dtype=torch.float64), tmp_path).train()
    assert loaded.peft_method == METHOD
    expected, _ = loss_and_grads(model, batch)
    for each in (loaded, fuse(loaded), copy.deepcopy(model), unfuse(copy.deepcopy(loaded))):
        assert_same_in_double(loss_and_grads(each, batch)[0], expected)


def test_what_does_not_fit_is_one_sentence():
    model = model_of()
    with pytest.raises(ValueError, match=r"merge_peft: .* cannot be merged: a sample's task weights its experts"):
        merge_peft(model)
    for ids in (torch.tensor([0, 1, 4]), torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[0, 1, 2]])):
        with pytest.raises(ValueError, match=r"task_ids: expected integers \[B\] below 4, got"):
            model(**tiny_batch("llama"), task_ids=ids)
    with pytest.raises(ValueError, match=r"a gate that can be broadcast to \[3, .*'experts'\], got \[2, 1, 3\]"):
        fuse(model)(**tiny_batch("llama"), task_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"MOELoRA\.r: expected a multiple of the 3 experts, got 4"):
        MOELoRA(r=4, experts=3)

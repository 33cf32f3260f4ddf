"""Bases and cells for real, at the smallest size, in this process."""

from dataclasses import replace

import pytest
import torch

from mmpeft_fast.data import Collator
from mmpeft_fast.data.sets import load_set
from mmpeft_fast.models import load_pretrained, tiny_model
from mmpeft_fast.study import base as base_module
from mmpeft_fast.study.base import build_base
from mmpeft_fast.study.cell import Subject, measure, measure_on
from mmpeft_fast.study.cells import TINY_MODELS, BaseSpec, plan
from mmpeft_fast.study.inputs import Inputs, load_samples, sample_batches
from mmpeft_fast.study.run import MEASURED
from mmpeft_fast.study.steps import frozen_step, frozen_twin, inputs_for, training_steps

EVAL_SAMPLES = 4


@pytest.fixture(scope="module")
def inputs(conversations) -> Inputs:
    return Inputs(train_json=str(conversations[0]), train_images=str(conversations[1]))


@pytest.fixture(scope="module")
def bases(inputs, conversations, tmp_path_factory) -> dict:
    """A base of each tiny model after one step of training: its folder."""
    folders = {}
    for model in TINY_MODELS:
        folders[model] = tmp_path_factory.mktemp("bases") / model
        spec = BaseSpec(model=model, data="test", pretrain_steps=1, seed=0)
        build_base(spec, inputs, eval_samples=EVAL_SAMPLES, threads=1, folder=folders[model])
    return folders


@pytest.fixture
def small(config):
    """The plan's cells at the smallest size, by (model, method, implementation)."""
    config = replace(config, methods=("lora", "prefix"), steps=3, batch_size=2, eval_samples=EVAL_SAMPLES)
    cells = plan(config)[1]
    # Without dropout peft and fused compute the same; with it their masks differ.
    cells = [
        replace(cell, overrides=cell.overrides | ({"dropout": 0.0} if cell.method == "lora" else {})) for cell in cells
    ]
    return {(cell.model, cell.method, cell.implementation): cell for cell in cells}


def test_samples_for_training_and_evaluation_are_disjoint_and_batches_repeat(inputs):
    train, evaluation = load_samples(inputs, "", eval_samples=EVAL_SAMPLES)
    assert len(evaluation) == EVAL_SAMPLES and not {s.id for s in train} & {s.id for s in evaluation}
    batches = list(sample_batches(train, batch_size=7, steps=9, seed=3))
    assert batches == list(sample_batches(train, batch_size=7, steps=9, seed=3))
    assert batches != list(sample_batches(train, batch_size=7, steps=9, seed=4))
    assert {len(batch) for batch in batches} == {7}
    seen = [sample.id for batch in batches for sample in batch]
    assert sorted(seen[: len(train)]) == sorted(sample.id for sample in train)  # every sample once before any twice


@pytest.mark.parametrize("model_name", TINY_MODELS)
def test_peft_and_fused_cells_of_the_same_seed_train_alike(model_name, bases, inputs, small):
    """A cell starts from a saved base, as from any checkpoint, and leaves a row that is complete."""
    outcomes = {}
    for implementation in ("peft", "fused"):
        cell = small[model_name, "lora", implementation]
        outcomes[implementation] = outcome = measure(cell, inputs, str(bases[model_name]))
        derived = {"tokens_per_s", "loss_first", "loss_last"} | ({"accuracy"} if implementation == "peft" else set())
        assert outcome.keys() == set(MEASURED) - derived
        assert len(outcome["losses"]) == cell.steps
        assert outcome["tokens_per_step"] <= outcome["padded_tokens_per_step"]
        assert 0 < outcome["saved_mib"] < outcome["peak_mib"]
    peft, fused = outcomes["peft"], outcomes["fused"]
    assert fused["losses"] == pytest.approx(peft["losses"])
    for same in ("trainable_params", "total_params", "tokens_per_step", "supervised_tokens_per_step"):
        assert fused[same] == peft[same], same
    assert fused["saved_mib"] < peft["saved_mib"]


def test_a_frozen_cell_trains_nothing(bases, inputs, small):
    cell = small["tiny-llava", "none", "frozen"]
    outcome = measure(replace(cell, batch_size=5), inputs, str(bases["tiny-llava"]))
    assert outcome["trainable_params"] == 0
    assert outcome["step_ms_p50"] == outcome["frozen_step_ms_p50"]
    again = measure(replace(cell, batch_size=5), inputs, str(bases["tiny-llava"]))
    assert again["losses"] == outcome["losses"]
    assert outcome["losses"][0] == outcome["losses"][-1]  # nothing was learned, and the last batch is the first again


def test_a_twin_shares_storage_and_stays_frozen(bases, inputs):
    model, processor = load_pretrained(str(bases["tiny-llava"]), dtype=torch.float32)
    twin = frozen_twin(model)
    pairs = dict(zip(model.parameters(), twin.parameters(), strict=True))
    assert all(ours.data_ptr() == other.data_ptr() and ours is not other for ours, other in pairs.items())

    batch = Collator(processor)(load_samples(inputs, "", eval_samples=EVAL_SAMPLES)[0][:2])
    seen = []
    twin.get_input_embeddings().register_forward_hook(lambda _m, _i, output: seen.append(output))
    loss = frozen_step(twin, inputs_for(twin, batch))
    assert torch.isfinite(loss) and not loss.requires_grad
    assert all(parameter.grad is None for parameter in twin.parameters())
    assert seen[0].grad is not None and seen[0].grad.abs().sum() > 0
    frozen_step(twin, inputs_for(twin, batch))
    assert len(twin.get_input_embeddings()._forward_hooks) == 1  # only this test's own


def test_training_steps_change_what_is_trainable_and_nothing_else(bases, inputs):
    model, processor = load_pretrained(str(bases["tiny-llava"]), dtype=torch.float32)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable"):
        training_steps(model, learning_rate=0.1, num_steps=2)
    head = model.get_output_embeddings().weight.requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = Collator(processor)(load_samples(inputs, "", eval_samples=EVAL_SAMPLES)[0][:2])
    step = training_steps(model, learning_rate=0.1, num_steps=2)
    step(inputs_for(model, batch))  # the first step of the warm-up has no learning rate yet
    step(inputs_for(model, batch))
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {name for name, value in model.named_parameters() if value is head}
    assert head.grad is None


def test_a_base_of_easy_vqa_learns_from_pixels_and_repeats_bit_by_bit(tmp_path, monkeypatch):
    """A moment of its training on a few images: tower, connector and decoder have moved, and again to the same bits."""
    monkeypatch.setattr(base_module, "load_set", lambda *args, limit=None: load_set(*args, limit=64))
    spec = BaseSpec(model="tiny-llava", data="easy-vqa", pretrain_steps=3, seed=0, tower_epochs=1)
    states = []
    for name in ("one", "again"):
        build_base(spec, Inputs(), eval_samples=1, threads=1, folder=tmp_path / name)
        states.append(load_pretrained(str(tmp_path / name), dtype=torch.float32)[0].state_dict())
    assert all(value.equal(states[1][name]) for name, value in states[0].items())
    random_model = tiny_model(
        "llava", load_pretrained(str(tmp_path / "one"), dtype=torch.float32)[1].tokenizer, seed=0
    ).state_dict()
    moved = {name.split(".")[1] for name, value in states[0].items() if not value.equal(random_model[name])}
    assert {"vision_tower", "multi_modal_projector", "language_model"} <= moved


def test_cells_of_one_process_are_what_each_is_alone(bases, conversations, config, tmp_path):
    """Several cells on one base: the second does not see what the first has trained."""
    data, images = conversations
    inputs = Inputs(train_json=str(data), train_images=str(images))
    config = replace(config, methods=("ia3",), implementations=("fused",), steps=3, batch_size=2, eval_samples=4)
    cell = replace(plan(config)[1][0], timed=False)
    subject = Subject(str(bases["tiny-llava"]), "fp32", inputs)
    first, second = measure_on(subject, cell), measure_on(subject, cell)
    assert first == second and len(first["losses"]) == 3 and "step_ms_p50" not in first
    assert first["losses"] == measure(replace(cell, timed=True), inputs, str(bases["tiny-llava"]))["losses"]
    tuned = measure_on(subject, replace(cell, train_connector=True))
    assert tuned["trainable_params"] > first["trainable_params"]

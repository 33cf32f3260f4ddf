"""What families of text alone have and do not have, and training one from the command line."""

import json

import pytest
import torch

from mmpeft_fast.cli import main
from mmpeft_fast.models import FAMILIES
from mmpeft_fast.models.inputs import training_batch
from mmpeft_fast.plan.placeholders import Placeholders
from tests.tiny_models import TEXT_FAMILIES, tiny_model


def test_which_families_read_text_alone():
    assert TEXT_FAMILIES == ("llama", "mistral", "qwen2", "qwen3")
    for name, family in FAMILIES.items():
        assert bool(family.connector) == bool(family.vision_tower) == (name not in TEXT_FAMILIES)


@pytest.mark.parametrize("name", TEXT_FAMILIES)
def test_train_connector_has_nothing_to_train(name):
    with pytest.raises(ValueError, match=f"{name}.* reads text alone; expected train_connector=False"):
        FAMILIES[name].require_connector()
    FAMILIES["llava"].require_connector()


def test_full_attention_is_read_from_window_and_layer_types():
    for name, window, layer_types, expected in (
        ("mistral", None, None, True),
        ("mistral", 8, None, False),
        ("qwen2", 8, ["full_attention", "sliding_attention"], False),
        ("qwen2", 8, ["full_attention", "full_attention"], True),
        ("llama", None, None, True),
    ):
        model = tiny_model(name)
        model.config.sliding_window = window
        if layer_types is not None:
            model.config.layer_types = layer_types
        assert FAMILIES[name].full_attention(model) == expected


@pytest.mark.parametrize("model, method", [("tiny-llama", "lora"), ("tiny-qwen3", "prefix")])
def test_train_from_the_command_line(model, method, tmp_path, capsys):
    turns = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(2)]))
    output = tmp_path / "run"
    arguments = ["train", "--model", model, "--method", method, "--data", str(data), "--images", str(tmp_path)]
    arguments += ["--eval-data", str(data), "--eval-images", str(tmp_path), "--max-steps", "2", "--batch-size", "2"]
    arguments += ["--global-batch-size", "2", "--output", str(output), "--no-progress", "--cpu"]
    assert main(arguments) == 0
    assert json.loads((output / "result.json").read_text())["steps"] == 2
    assert "done: step 2" in capsys.readouterr().out


def test_plan_and_profile_of_text_take_no_images(capsys, tmp_path):
    assert main(["plan", "--model", "llama-3.1-8b", "--images", "1"]) == 2
    folder = str(tmp_path / "profile")
    assert main(["profile", "--model", "tiny-llama", "--images", "1", "--output", folder]) == 2
    errors = capsys.readouterr().err
    assert errors.count("images: llama reads text alone; expected 0 images a sample") == 2
    assert main(["plan", "--model", "qwen3-0.6b", "--seq-len", "128"]) == 0


def test_a_configuration_with_several_end_tokens_can_be_planned():
    config = FAMILIES["llama"].sizes["llama-3.1-8b"]()
    config.eos_token_id = [128001, 128008, 5]
    batch = training_batch(
        config, Placeholders("cuda").empty, batch_size=1, seq_len=9, labelled=4, images=0, image_size=None,
        dtype=torch.bfloat16,
    )  # fmt: skip
    assert set(batch) == {"input_ids", "attention_mask", "labels"} and not (batch["input_ids"] == 5).any()

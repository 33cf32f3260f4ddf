"""The plan and what identifies a cell."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from mmpeft_fast.models import FAMILIES
from mmpeft_fast.study import cells
from mmpeft_fast.study.cells import AXES, MAJORITY, NO_METHOD, OF_THE_PAPERS, TINY_MODELS, StudyConfig, plan


def test_the_study_covers_every_method_twice_and_frozen_once_per_model():
    bases, planned = plan(StudyConfig(output=Path("out")))
    assert [base.model for base in bases] == list(TINY_MODELS)
    for model in TINY_MODELS:
        own = Counter((cell.method, cell.implementation) for cell in planned if cell.model == model and not cell.axis)
        assert own == Counter([("none", "frozen")] + [(m, i) for m in OF_THE_PAPERS for i in ("peft", "fused")])
        assert len({cell.base for cell in planned if cell.model == model}) == 1
    assert len({cell.key for cell in planned}) == len({cell.name for cell in planned}) == len(planned)
    assert sum(not cell.axis for cell in planned) == 26


def test_what_is_varied_is_of_the_first_model_fused_and_not_timed():
    planned = plan(StudyConfig(output=Path("out")))[1]
    varied = [cell for cell in planned if cell.axis]
    assert {cell.axis for cell in varied} == set(AXES)
    assert {cell.model for cell in varied} == {next(iter(TINY_MODELS))} and not any(cell.timed for cell in varied)
    assert {cell.implementation for cell in varied} == {"fused", "frozen", MAJORITY}
    by_name = {cell.name: cell for cell in varied}
    rank = by_name["tiny-llava lora fused size r=4"]
    assert rank.overrides == {"r": 4, "alpha": 8} and rank.task == "unseen"
    assert by_name["tiny-llava ia3 fused task seen"].task == "seen"
    assert by_name["tiny-llava ia3 fused connector tuned"].train_connector
    assert by_name["tiny-llava lora fused samples 12"].train_samples == 12
    assert by_name["tiny-llava adapter fused location both"].overrides["targets"] == "both"
    assert by_name["tiny-llava prefix fused seed 21"].seed == 21


def test_single_values_of_an_axis_are_run_where_they_are_named():
    planned = plan(StudyConfig(output=Path("out"), methods=("lora",), axes=("size=r=4", "location=mlp,both")))[1]
    assert [cell.name for cell in planned if cell.axis] == [
        "tiny-llava lora fused location mlp",
        "tiny-llava lora fused location both",
        "tiny-llava lora fused size r=4",
    ]


def test_the_studys_own_seed_is_not_run_twice():
    planned = plan(StudyConfig(output=Path("out"), methods=("lora",), axes=("seed",), seed=21))[1]
    assert [cell.seed for cell in planned if cell.axis] == [42, 63]


@pytest.mark.parametrize("changed", [{"axes": ()}, {"models": ("tiny-qwen2-vl",)}, {"implementations": ("peft",)}])
def test_nothing_is_varied_where_that_was_not_asked_for(changed):
    assert not any(cell.axis for cell in plan(StudyConfig(output=Path("out"), **changed))[1])


def test_the_settings_fit_the_methods_and_families():
    planned = plan(StudyConfig(output=Path("out")))[1]
    settings = {cell.method: cell for cell in planned if cell.method != NO_METHOD and not cell.axis}
    assert tuple(settings) == OF_THE_PAPERS
    assert settings["lora"].overrides == {"r": 16, "alpha": 32} and settings["adapter"].overrides == {"bottleneck": 16}
    assert {name: cell.learning_rate for name, cell in settings.items()} == {
        "lora": 5e-3, "ia3": 1e-1, "adapter": 1e-2, "prefix": 3e-1, "layernorm": 3e-3, "layernorm-simp": 1e-1
    }  # fmt: skip
    assert set(TINY_MODELS.values()) <= set(FAMILIES)


def test_peft_and_fused_differ_in_nothing_but_the_implementation():
    by_name = {
        (cell.model, cell.method, cell.implementation): cell
        for cell in plan(StudyConfig(output=Path("out"), axes=()))[1]
    }
    for (model, method, implementation), cell in by_name.items():
        if implementation == "peft":
            assert replace(cell, implementation="fused") == by_name[model, method, "fused"]


@pytest.mark.parametrize("changed", [{"steps": 9}, {"seed": 1}, {"dtype": "bf16"}, {"batch_size": 2}, {"threads": 3}])
def test_a_changed_setting_is_another_cell(changed):
    config = StudyConfig(output=Path("out"), models=("tiny-llava",), methods=("lora",))
    keys = {cell.key for cell in plan(config)[1]}
    assert keys.isdisjoint(cell.key for cell in plan(replace(config, **changed))[1])
    assert keys == {cell.key for cell in plan(replace(config, output=Path("elsewhere"), redo=True))[1]}


def test_a_changed_version_or_source_is_another_cell(monkeypatch):
    cell = plan(StudyConfig(output=Path("out")))[1][0]
    key = cell.key
    monkeypatch.setattr(cells, "versions", lambda: {"torch": "another"})
    other_version = cell.key
    monkeypatch.setattr(cells, "_sources_digest", lambda: "another")
    assert len({key, other_version, cell.key}) == 3


def test_the_users_data_is_identified_by_its_content(config, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(config.data.read_bytes())
    keys = [cell.key for cell in plan(config)[1]]
    assert keys == [cell.key for cell in plan(replace(config, data=copy))[1]]
    copy.write_bytes(config.data.read_bytes() + b"\n")
    assert keys[0] != plan(replace(config, data=copy))[1][0].key


def test_a_real_checkpoint_needs_no_base_of_ours(config):
    bases, planned = plan(replace(config, base="some/checkpoint"))
    assert bases == []
    assert {(cell.model, cell.base) for cell in planned} == {("some/checkpoint", "some/checkpoint")}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"models": ("gpt",)}, ("model", "tiny-llava", "'gpt'")),
        ({"methods": ("lora", "qlora")}, ("method", "layernorm-simp", "'qlora'")),
        ({"methods": ("lora", "lora")}, ("once", "lora, lora")),
        ({"axes": ("depth",)}, ("axis", "location", "'depth'")),
        ({"axes": ("location", "location=mlp")}, ("once", "location, location=mlp")),
        ({"axes": ("size=r=3",)}, ("axis size", "r=2, r=4", "'r=3'")),
        ({"axes": ("seed=",)}, ("axis seed", "21, 42, 63", "''")),
        ({"implementations": ()}, ("implementation", "none")),
        ({"dtype": "fp16"}, ("dtype", "bf16", "'fp16'")),
        ({"steps": 1}, ("steps", "at least 2", "1")),
        ({"batch_size": 0}, ("batch_size", "at least 1", "0")),
        ({"pretrain_steps": -1}, ("pretrain_steps", "at least 0", "-1")),
        ({"seed": 2**31}, ("seed", str(2**31))),
        ({"data": Path("a.json")}, ("--data and --images together", "only --data")),
        ({"images": Path("a")}, ("--data and --images together", "only --images")),
        ({"output": Path(__file__)}, ("folder", "test_cells.py")),
    ],
)
def test_wrong_settings_say_what_was_expected_and_what_came(wrong, words):
    with pytest.raises(ValueError) as error:
        StudyConfig(**{"output": Path("out"), **wrong})
    assert all(word in str(error.value) for word in words), str(error.value)

"""The harness itself, on a suite of three made-up tests; pytest runs inside this process."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.peers.comparing import compare, report
from tests.peers.suites import Suite

MADE_UP = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def called():
    config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, hidden_act="gelu")
    model = LlamaForCausalLM(config).eval()
    model(input_ids=torch.arange(4)[None])
    return model


def test_sees_a_class():
    assert type(called().model.layers[0]).__mro__[1].__name__ == "GradientCheckpointingLayer"


def test_sees_nothing():
    assert called() is not None


def test_never_right():
    assert called() is None


def test_without_a_model():
    pass
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A suite, and how it is run: with the plugin from its own folder, as in a process of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    root = tmp_path / "suite"
    root.mkdir()
    file = root / "test_made_up.py"
    file.write_text(MADE_UP)
    return Suite("made up", root, file)


class Launch:
    """Runs pytest here; notes the number of runs."""

    def __init__(self):
        self.num_runs = 0

    def __call__(self, arguments: list[str], folder: Path) -> int:
        self.num_runs += 1
        here = os.getcwd()
        os.chdir(folder)
        sys.modules.pop("test_made_up", None)
        try:
            return int(pytest.main([*arguments, "-p", "no:xdist"]))
        finally:
            os.chdir(here)


def test_counts_what_differs_and_goes_on_where_it_was(suite, tmp_path, capsys):
    launch, runs = Launch(), tmp_path / "runs"
    outcome = compare(suite, runs, launch)
    assert [id.rpartition("::")[2] for id in outcome.differences] == ["test_sees_a_class"]
    assert not outcome.unsteady
    capsys.readouterr()
    assert report([outcome]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "1 differences"
    assert "unfused  3 passed, 1 failed, 0 skipped" in said
    assert "fused    1 passed, 1 failed, 0 skipped" in said  # neither what fails already nor what has no model
    assert "layers fused in 2 tests" in said

    assert launch.num_runs == 4  # both sides, and both once more
    assert compare(suite, runs, launch).differences.keys() == outcome.differences.keys()
    assert launch.num_runs == 4

    # Killed while it wrote the second line: the first is not run again.
    file = runs / "made-up.unfused.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    tests = [line for line in lines if "id" in json.loads(line)]
    file.write_text("".join([lines[0], tests[0], tests[1][:20]]))
    assert compare(suite, runs, launch).sides["unfused"].keys() == outcome.sides["unfused"].keys()
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["selected"] for line in again if "selected" in line] == [3]

    # A changed suite is run anew.
    suite.file.write_text(MADE_UP.replace("test_sees_a_class", "test_sees_a_name"))
    assert len(compare(suite, runs, launch).differences) == 1


def test_no_difference_is_success(suite, tmp_path, capsys):
    suite.file.write_text(MADE_UP.partition("def test_sees_a_class")[0] + "\ndef test_runs():\n    called()\n")
    outcome = compare(suite, tmp_path / "runs", Launch())
    assert report([outcome]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 differences"


def test_other_chosen_tests_are_another_run(suite, tmp_path):
    launch, runs = Launch(), tmp_path / "runs"
    assert [*compare(suite, runs, launch, "without").sides["unfused"]] == ["test_made_up.py::test_without_a_model"]
    assert len(compare(suite, runs, launch).sides["unfused"]) == 4
    head = json.loads((runs / "made-up.unfused.jsonl").read_text().splitlines()[0])
    assert head["helpers"]["pytest"] == pytest.__version__ and head["chosen"] is None


@pytest.mark.parametrize("content", ["import not_there_at_all", ""])
def test_a_suite_that_cannot_be_collected_is_an_error(suite, tmp_path, capsys, content):
    suite.file.write_text(content)
    outcome = compare(suite, tmp_path / "runs", Launch())
    assert report([outcome]) == 2
    assert "could not be collected" in capsys.readouterr().out

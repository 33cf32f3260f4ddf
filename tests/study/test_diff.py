"""`study diff` and `study status` on rows of the study."""

import json
import shutil

import pytest

from mmpeft_fast import cli
from mmpeft_fast.study.run import run_study


@pytest.fixture
def two_runs(config, jobs, tmp_path):
    """A run, and a copy of it whose numbers can be changed: (A, B, change)."""
    run_study(config)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(config.output / "cells", other / "cells")

    def change(edit):
        for path in (other / "cells").iterdir():
            row = json.loads(path.read_text())
            keeps = edit(row) is not False
            path.unlink()
            if keeps:
                path.write_text(json.dumps(row))

    return str(config.output), str(other), change


def diff(*words, capsys) -> tuple[int, dict]:
    code = cli.main(["study", "diff", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_run_does_not_differ_from_itself(two_runs, capsys):
    first, second, _ = two_runs
    code, found = diff(first, second, "--fail-above", "0", capsys=capsys)
    assert code == 0 and found["changes"] and not found["lost"] and not found["new"]
    assert all(change["percent"] == 0 for change in found["changes"])


@pytest.mark.parametrize(
    "number, factor, worse",
    [("step_ms_p50", 1.2, 20), ("step_ms_p50", 0.8, -20), ("accuracy", 0.9, 10), ("tokens_per_s", 1.1, -10)],
)
def test_worse_is_counted_in_the_right_direction(two_runs, capsys, number, factor, worse):
    first, second, change = two_runs

    def edit(row):
        if row["method"] == "lora" and row["implementation"] == "fused":
            row[number] *= factor

    change(edit)
    code, found = diff(first, second, "--fail-above", "5", capsys=capsys)
    changed = [each for each in found["changes"] if each["percent"]]
    assert {(each["cell"].split(" ", 1)[1], each["number"]) for each in changed} == {("lora fused", number)}
    assert all(each["worse_percent"] == pytest.approx(worse) for each in changed)
    assert code == (1 if worse > 5 else 0)
    assert diff(first, second, "--fail-above", "25", capsys=capsys)[0] == 0
    assert diff(first, second, "--fail-above", "5", "--numbers", "peak_mib", capsys=capsys)[0] == 0
    assert diff(first, second, capsys=capsys)[0] == 0


def test_a_cell_that_is_lost_fails(two_runs, capsys):
    first, second, change = two_runs
    change(lambda row: row["method"] != "ia3")
    code, found = diff(first, second, "--fail-above", "50", capsys=capsys)
    assert code == 1 and len(found["lost"]) == 4
    code, found = diff(second, first, "--fail-above", "50", capsys=capsys)
    assert code == 0 and len(found["new"]) == 4


def test_scores_of_recipes(tmp_path, capsys):
    for name, chair_s, accuracy in (("a", 0.1, 0.8), ("b", 0.2, 0.9)):
        scores = [
            {"epoch": 1, "set": "x", "metric": "shape_hallucination", "chair_s": chair_s},
            {"epoch": 1, "set": "y", "metric": "exact_match", "accuracy": accuracy},
        ]
        row = {"spec_key": name, "status": "success", "model": "m", "method": "lora", "implementation": "fused"}
        row |= {"recipe": "r", "cell": "c", "time": "2000", "scores": scores}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    _, found = diff(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), capsys=capsys)
    worse = {each["number"]: each["worse_percent"] for each in found["changes"]}
    assert worse == {"x shape_hallucination": pytest.approx(100), "y exact_match": pytest.approx(-12.5)}


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere", "nowhere"], "nowhere: expected a study's results, found none"),
        (["A", "B", "--fail-above", "-1"], "--fail-above: expected a percentage of at least 0, got -1"),
        (["A", "B", "--numbers", "beauty"], "--numbers: expected some of step_ms_p50"),
        (["A", "EMPTY"], "empty.jsonl: expected a study's results, found none"),
    ],
)
def test_what_cannot_be_compared(two_runs, tmp_path, words, said, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    names = {"A": two_runs[0], "B": two_runs[1], "EMPTY": str(tmp_path / "empty.jsonl")}
    assert cli.main(["study", "diff", *(names.get(word, word) for word in words)]) == 2
    assert said in capsys.readouterr().err


def test_the_text_names_cell_and_change(two_runs, capsys):
    first, second, change = two_runs
    change(lambda row: row.update(peak_mib=88.0))
    assert cli.main(["study", "diff", first, second, "--numbers", "peak_mib"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["cell", "number", "A", "B", "change"]
    assert lines[1].split()[-4:] == ["80", "88", "+10.0", "%"]


def test_status_of_a_run_that_was_interrupted(config, jobs, capsys):
    jobs.interrupt_at = "tiny-llava ia3 peft"
    with pytest.raises(KeyboardInterrupt):
        run_study(config)
    assert cli.main(["study", "status", str(config.output)]) == 0
    out = capsys.readouterr().out
    assert "3 of 10 cells done, 0 failed, 7 to come" in out and "next: tiny-llava ia3 peft" in out
    assert cli.main(["study", "status", str(config.output), "--json"]) == 0
    (state,) = json.loads(capsys.readouterr().out)
    assert len(state["pending"]) == 7 and state["older_rows"] == 0


def test_status_of_nothing(tmp_path, capsys):
    assert cli.main(["study", "status", str(tmp_path)]) == 2
    assert "expected the output folder of a study" in capsys.readouterr().err

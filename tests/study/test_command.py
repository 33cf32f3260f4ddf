"""`mmpeft-fast study` from its words to its files, with faked jobs."""

import pytest

from mmpeft_fast import cli
from mmpeft_fast.study.cells import StudyConfig
from mmpeft_fast.study.command import _config


@pytest.fixture
def words(config) -> list[str]:
    user = ["--data", str(config.data), "--images", str(config.images), "--eval-samples", "4"]
    return ["study", "--models", "tiny-llava", "--methods", "lora", *user, "--output", str(config.output)]


def test_a_run_ends_with_the_table_and_the_paths(words, config, jobs, capsys):
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["tiny-llava", "–", "frozen"],
        ["tiny-llava", "lora", "peft"],
        ["tiny-llava", "lora", "fused"],
    ]
    for name in ("report.html", "results.jsonl"):
        assert (config.output / name).exists()
        assert str(config.output / name) in "\n".join(lines[-2:])
    assert "4/4  tiny-llava lora fused" in err


def test_failed_cells_are_told_and_end_in_exit_code_1(words, jobs, capsys):
    jobs.fail["tiny-llava lora peft"] = "ValueError: no such thing"
    assert cli.main(words) == 1
    out, err = capsys.readouterr()
    assert "failed: tiny-llava lora peft: ValueError: no such thing" in out
    assert "ValueError: no such thing" in err


def test_an_interrupt_says_how_to_go_on(words, jobs, capsys):
    jobs.interrupt_at = "tiny-llava lora fused"
    assert cli.main(words) == 130
    assert "interrupted: 2 of 3 cells are done; the same command goes on" in capsys.readouterr().err


def test_report_only_needs_rows_and_runs_nothing(words, config, jobs, capsys):
    only = ["study", "--report-only", "--output", str(config.output)]
    assert cli.main(only) == 2
    assert "expected rows in" in capsys.readouterr().err
    assert not config.output.exists()

    cli.main(words)
    report = config.output / "report.html"
    first = report.read_text()
    report.unlink()
    jobs.names.clear()
    assert cli.main(only) == 0
    assert jobs.names == []
    assert report.read_text() == first


@pytest.mark.parametrize(
    "wrong, said",
    [
        (["--models", "gpt"], "model: expected one of tiny-llava, tiny-qwen2-vl, got 'gpt'"),
        (["--methods", "qlora"], "method: expected one of lora"),
        (["--steps", "0"], "steps: expected at least 2, got 0"),
        (["--data", "no/such/file.json", "--images", "."], "no/such/file.json"),
        (["--images", "."], "--data and --images together"),
        (["--base", "./no/such/checkpoint"], "no/such/checkpoint"),
        (["--base", "x", "--models", "tiny-llava"], "either --base or --models"),
    ],
)
def test_bad_input_ends_before_anything_is_written(wrong, said, tmp_path, jobs, capsys):
    output = tmp_path / "out"
    assert cli.main(["study", *wrong, "--output", str(output)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert not output.exists() and jobs.names == []


def test_options_left_out_take_the_configurations_defaults(tmp_path):
    words = ["study", "--output", str(tmp_path), "--threads", "1", "--device", "cpu"]
    assert _config(cli._parser(words).parse_args(words)) == StudyConfig(output=tmp_path)

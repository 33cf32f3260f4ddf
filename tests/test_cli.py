"""The command line: its exit codes and what it says."""

import json
import subprocess
import sys

import pytest
import torch

from mmpeft_fast import __version__, cli


def fail_with(monkeypatch, error: BaseException) -> None:
    """Makes the doctor, the smallest command, raise."""

    def run(args):
        raise error

    monkeypatch.setattr("mmpeft_fast.doctor.run", run)


@pytest.mark.parametrize(
    "command", [[], *([name] for name in cli.COMMANDS)], ids=lambda words: " ".join(words) or "top"
)
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*command, "--help"])
    assert exit_.value.code == 0
    help_text = capsys.readouterr().out
    assert " ".join(["usage: mmpeft-fast", *command]) in help_text
    if not command:
        assert all(name in help_text for name in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"mmpeft-fast {__version__}\n"


@pytest.mark.parametrize(
    "error, sentence",
    [
        (ValueError("rank: expected at least 1,\n  got 0"), "error: rank: expected at least 1, got 0\n"),
        (FileNotFoundError(2, "No such file or directory", "a.json"), "error: a.json: No such file or directory\n"),
        (PermissionError(13, "Permission denied", "out"), "error: out: Permission denied\n"),
        (OSError("no checkpoint\nin folder x"), "error: no checkpoint in folder x\n"),
        (MemoryError(), "error: out of memory: MemoryError\n"),
        (
            RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 3 bytes."),
            "error: out of memory: can't allocate memory: you tried 3 bytes.\n",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), "error: out of memory: CUDA out of memory.\n"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, capsys, error, sentence):
    fail_with(monkeypatch, error)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr() == ("", sentence)


def test_interrupt_is_exit_code_130_and_says_how_to_go_on(monkeypatch, capsys):
    fail_with(monkeypatch, KeyboardInterrupt("3 of 4 done"))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted: 3 of 4 done\n"
    fail_with(monkeypatch, KeyboardInterrupt())
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    fail_with(monkeypatch, TypeError("our own mistake"))
    with pytest.raises(TypeError):
        cli.main(["doctor"])
    fail_with(monkeypatch, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError):
        cli.main(["doctor"])


@pytest.mark.parametrize("words", [["fly"], ["doctor", "--fly"], []])
def test_unknown_words_are_one_sentence_and_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_doctor_tells_versions_devices_and_providers(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["mmpeft-fast"] == __version__
    assert report["versions"]["python"] == sys.version.split()[0]
    assert report["devices"][0]["type"] == "cpu" and report["devices"][0]["memory_bytes"] > 2**20
    assert report["providers"] and all(
        row.keys() == {"device", "op", "provider", "reason"} for row in report["providers"]
    )
    assert report["available_providers"]["torch"] == "installed"
    assert {row["library"] for row in report["formats"]} == {"bitsandbytes", "torchao"}

    assert cli.main(["doctor"]) == 0
    table = capsys.readouterr().out
    for row in report["providers"]:
        assert row["op"] in table and row["reason"] in table


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "mmpeft_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"mmpeft-fast {__version__}\n")

"""The whole program without a GPU: its flow, its budget, and what is on disk when it is cut."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench.gpu import command, tuned
from bench.gpu.command import SECTIONS, Budget, Program
from bench.gpu.repository import ROOT
from bench.gpu.shapes import DRY


def test_unused_time_goes_to_later_sections():
    now = [100.0]
    budget = Budget(100, {"a": 1, "b": 1, "c": 2}, clock=lambda: now[0])
    assert budget.allowed("a") == 25
    now[0] += 5
    assert budget.used == 5 and budget.allowed("b") == pytest.approx(95 / 3)
    now[0] += 200
    assert budget.left == 0 and budget.allowed("c") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.gpu: expected a") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["--seconds", "5"], ["--sections", "everything"], ["--seconds", "many"]])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(wrong)
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_dry_run_goes_through_every_section(tmp_path):
    """What a GPU minute would be wasted on: every item's code runs here, in the processes that it would run in."""
    out = tmp_path / "out"
    assert command.main(["--dry", "--profile", "--out", str(out), "--seconds", "400"]) == 0
    rows = tuned.read_rows(out / "rows.jsonl")
    errors = [row for row in rows if isinstance(row.get("error"), str) and row.get("provider") != "cuda"]
    assert errors == []
    assert [row["name"] for row in tuned.of_section(rows, "sections")] == list(SECTIONS)
    assert not [row["outcome"] for row in tuned.of_section(rows, "sections") if " not " in row["outcome"]
                and not row["outcome"].startswith("0 ")]  # fmt: skip
    machine = rows[0]
    assert machine["section"] == "machine" and machine["copy_gb_s"] > 0 and machine["commit"]
    found = {name: tuned.of_section(rows, name) for name in (*SECTIONS, "trials")}
    assert {row["check"].split(":")[0] for row in found["checks"] if "check" in row} >= {
        "model",
        "kernel",
        "op",
        "gemm",
    }
    assert {"triton", "torch", "cuda"} == {row["provider"] for row in found["checks"]}
    assert {row["kernel"] for row in found["trials"]} == {"masked_dx"} and found["tiles"]
    assert {"step", "counts", "profile"} == {row["mode"] for row in found["steps"]}
    assert {row["implementation"] for row in found["tuned"]} == {"default"} and found["graphs"] and found["ops"]
    assert [row["not_run"] for row in found["peers"]]
    # Few and small files, and no machine's paths in what is kept.
    files = {path.name for path in out.iterdir()}
    assert {"rows.jsonl", "profile.md", "log.txt"} < files and len(files) == 4
    assert all(path.stat().st_size < 1 << 20 for path in out.iterdir())
    assert str(ROOT) not in (out / "rows.jsonl").read_text()
    made = tuned.table(rows, "out/rows.jsonl")
    (table,) = (json.loads(path.read_text()) for path in out.glob("*.json"))
    assert table["device"] == machine["device"] and table["gemm"] == made.gemm


def test_a_run_that_is_killed_leaves_whole_rows_and_a_table(tmp_path):
    arguments = ["--dry", "--out", str(tmp_path), "--sections", "checks"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (table,) = tmp_path.glob("*.json")
    rows = tuned.read_rows(tmp_path / "rows.jsonl")
    assert json.loads(table.read_text())["device"] == rows[0]["device"]


def program(tmp_path):
    made = Program(tmp_path, Budget(60, {"compile": 1, "checks": 1, "steps": 1}), DRY)
    return made


def test_sections_run_in_order_until_a_signal(tmp_path, monkeypatch, capsys):
    made = program(tmp_path)

    def checked(program):
        program.add("checks", {"ok": True, "check": "op: x", "rests": []})
        signal.raise_signal(signal.SIGINT)
        return "never said"

    def compiled(program):
        raise TypeError("no such thing")

    monkeypatch.setitem(command._RUN, "compile", compiled)
    monkeypatch.setitem(command._RUN, "checks", checked)
    assert command.run_sections(made, ["compile", "checks", "steps"]) == ["compile"]
    made.close()
    rows = tuned.read_rows(tmp_path / "rows.jsonl")
    assert rows[0]["outcome"] == "TypeError: no such thing" and rows[1]["section"] == "checks" and len(rows) == 2
    assert "checks: stopped by a signal" in capsys.readouterr().out


def test_a_failed_item_is_a_row_that_names_it(tmp_path):
    made = program(tmp_path)
    made.items(
        "compile", "tuning:compile_call", [{"kernel": "nothing", "problem": [], "dtype": "fp32", "device": "cpu"}]
    )
    made.close()
    (row,) = tuned.read_rows(tmp_path / "rows.jsonl")
    assert row["section"] == "compile" and row["kernel"] == "nothing" and row["error"].startswith("TypeError")

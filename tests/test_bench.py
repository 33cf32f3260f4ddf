"""Benchmarks compare like with like, and their programs run."""

import json

import pytest
import torch

from bench import ops, step, training
from bench.registry import OPS, Shape, make_case
from bench.rows import interleaved, read_rows
from bench.table import table
from tests.closeness import assert_exact

SMALL = Shape(
    tokens=12, length=6, hidden=16, intermediate=24, heads=2, rank=3, dropout=0.0, num_virtual_tokens=2, vocab=11
)


@pytest.mark.parametrize("name", OPS)
def test_fused_and_eager_compute_the_same(name):
    case = make_case(name, SMALL, dtype=torch.float64)
    fused, eager, frozen = (case.forwards[key]() for key in ("fused", "eager", "frozen"))
    for got, expected in zip(fused, eager, strict=True):
        assert_exact(got.detach(), expected.detach(), name)
    assert [y.shape for y in frozen] == [y.shape for y in fused]
    grads = {
        key: torch.autograd.grad(case.forwards[key](), case.wanted[key], [torch.ones_like(y) for y in fused])
        for key in ("fused", "eager")
    }
    for got, expected in zip(grads["fused"], grads["eager"], strict=True):
        assert_exact(got, expected, name)


def test_interleaved_takes_turns():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1)
    assert order == ["a", "b"] * 4
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_step_program(tmp_path, capsys):
    out = tmp_path / "rows" / "step.jsonl"
    sizes = {"hidden": 32, "intermediate": 48, "layers": 1, "heads": 2, "vocab": 40, "seq-len": 20, "r": 2, "rounds": 1}
    small = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    step.main([*small, "--methods", "lora", "ia3", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["method"], row["implementation"]) for row in rows] == [
        (method, name) for method in ("lora", "ia3") for name in ("frozen", "peft", "fused")
    ]
    saved = {row["implementation"]: row["saved_mib"] for row in rows if row["method"] == "lora"}
    assert saved["fused"] < saved["peft"]
    assert all(row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["torch"] for row in rows)
    assert "x frozen" in capsys.readouterr().out
    lines = table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| lora", "| ia3"]
    assert {line.count("|") for line in lines} == {9}


def test_ops_program_names_unknown_ops(capsys):
    with pytest.raises(SystemExit) as error:
        ops.main(["matmul"])
    assert error.value.code == 2
    assert "unknown ops ['matmul']; expected some of ['lora_linear'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "what, keys",
    [
        ("samples", {"recipe_samples_per_s", "fused_samples_per_s", "fused_shared_samples_per_s", "x_recipe"}),
        ("packing", {"padded_ms", "packed_ms", "padding_share", "time_saved"}),
    ],
)
def test_training(what, keys, tmp_path, capsys):
    small = "--hidden 256 --intermediate 512 --layers 1 --patches 4 --images 1 --batch-size 4 --epochs 2 --rounds 1"
    training.main([what, *small.split(), "--json", "--out", str(tmp_path / "rows.jsonl")])
    found = json.loads(capsys.readouterr().out)
    (row,) = read_rows(tmp_path / "rows.jsonl")
    assert keys <= found.keys() and found.items() <= row.items()
    if what == "packing":
        assert 0 < found["packed_tokens"] < found["padded_tokens"]
    else:
        rates = [found[f"{name}_samples_per_s"] for name in ("recipe", "fused_shared")]
        assert found["x_recipe"] == pytest.approx(rates[1] / rates[0])


def test_training_says_what_is_missing(capsys):
    for arguments, message in (
        (["order"], "--base: expected a checkpoint, got none"),
        (["samples", "--epochs", "1"], "--epochs: expected at least 2, as the first is not counted, got 1"),
    ):
        with pytest.raises(SystemExit) as stop:
            training.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

"""The suite ranks what is slow as slow, refuses what is wrong, and says what is missing or left out."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from bench.registry import OPS
from bench.suite import measure as measure_module
from bench.suite import run as runs
from bench.suite.cases import (
    LAYER,
    MODELS,
    STEP,
    Case,
    dimensions,
    features,
    growth_cases,
    random_case,
    stock,
    suite_cases,
)
from bench.suite.growth import exponent, growth_lines
from bench.suite.implementations import IMPLEMENTATIONS, Implementation, named
from bench.suite.measure import measure
from bench.suite.ops import Ops
from bench.suite.trials import Decoders, Judge, Trial
from mmpeft_fast import METHODS, benchmarks, cli

TINY = Case(
    model="tiny", hidden=64, intermediate=96, heads=4, kv_heads=2, has_bias=True, vocab=50, layers=2, rank=4,
    batch_size=2, seq_len=24,
)  # fmt: skip


def measured(case, *names, **others: Implementation):
    found = measure(
        case, named(list(names)) | others, device="cpu", seconds=1.0, left_out={}, rounds=5, with_work=False
    )
    return {row["implementation"]: row for row in found}


def slow(function):
    def called(*args, **kwargs):
        time.sleep(0.03)
        return function(*args, **kwargs)

    return called


def wrong(model, factor):
    for name, module in model.named_modules():
        if name.endswith("q_proj"):
            module.scaling["default"] *= factor
    return model


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch):
    monkeypatch.setattr(measure_module, "_WARM_UP_S", 0.0)


@pytest.fixture
def quick_machine(monkeypatch):
    """A machine whose rates need no measuring."""

    class Known(runs.Machine):
        def __init__(self, device, dtypes):
            self.device, self.bytes_per_s = device, 1e10
            self.flops_per_s = dict.fromkeys(dtypes, 1e10)

    monkeypatch.setattr(runs, "Machine", Known)


def test_slow_is_ranked_slow_and_wrong_is_refused():
    rows = measured(
        TINY, "fused", "composite", "manual",
        slow=Implementation(wrap=slow), wrong=Implementation(prepare=functools.partial(wrong, factor=1.01)),
    )  # fmt: skip
    assert {name: row["status"] for name, row in rows.items() if name != "wrong"} == dict.fromkeys(
        ("frozen", "peft", "fused", "composite", "manual", "slow"), "ok"
    )
    assert max((row for row in rows.values() if "p50_ms" in row), key=lambda row: row["p50_ms"]) is rows["slow"]
    assert rows["slow"]["p50_ms"] > 30 and rows["slow"]["x_peft"] > 1
    refused = rows["wrong"]
    assert refused["status"] == "refused" and "allowed" in refused["reason"] and "p50_ms" not in refused
    assert refused["error"] > 2 * refused["eager_error"]
    assert len(rows["peft"]["rounds_ms"]) == 5 and rows["peft"]["noise"] > 0
    assert rows["fused"]["saved_mib"] < rows["peft"]["saved_mib"] and rows["fused"]["commit"]


@pytest.mark.parametrize("what, method", [(STEP, "lora"), (LAYER, "lora"), (STEP, "prefix"), (LAYER, "ia3")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_method_passes_its_judge(what, method, dtype):
    case = replace(TINY, what=what, method=method, rank=0 if method == "ia3" else 4, dtype=dtype)
    assert_judged(case, ("peft", "peft_bf16", "fused", "fused_torch", "composite", "manual"))


def assert_judged(case, names):
    subject = (Ops if case.is_op else Decoders)(case, "cpu")
    judge = Judge(case, subject)
    for name in names:
        implementation = IMPLEMENTATIONS[name]
        if implementation.why_not(case, "cpu") is None:
            with contextlib.ExitStack() as stack:
                found = judge.verdict(subject.trial(implementation, stack))
            assert found["ok"], (name, found)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_op_passes_its_judge(op, dtype):
    method = "prefix" if op == "prefix_attention" else "lora"
    assert_judged(replace(TINY, what=op, method=method, dtype=dtype), ("peft", "fused", "fused_torch"))


def test_ops_are_cases_too():
    cases = suite_cases("cpu", ["op"], ["internvl3-1b"], sorted(METHODS), ["fp32"])
    assert {case.what for case in cases} == set(OPS) and all(case.is_op for case in cases)
    rows = measured(replace(TINY, what="swiglu_ia3_down", method="ia3", dropout=0.1), "fused", "compile", "composite")
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "ok", "missing", "missing"]
    assert rows["compile"]["reason"] == "has no single ops" and rows["fused"]["peak_mib"] > 0


def test_dropout_is_kept_in_the_times_and_off_before_the_judge():
    rows = measured(replace(TINY, dropout=0.3), "fused", "composite", "manual")
    assert [rows[name]["status"] for name in ("peft", "fused", "composite", "manual")] == ["ok", "ok", "ok", "missing"]
    assert rows["manual"]["reason"] == "has no dropout"


def test_without_a_truth_or_a_yardstick_nothing_is_timed(monkeypatch):
    def no_memory(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Trial, "run", no_memory)
    assert {row["status"] for row in measured(TINY, "fused").values()} == {"failed"}
    monkeypatch.undo()
    broken = replace(IMPLEMENTATIONS["frozen"], prepare=no_memory)
    rows = measured(TINY, frozen=broken)
    assert (rows["frozen"]["status"], rows["peft"]["status"]) == ("failed", "ok") and "p50_ms" not in rows["peft"]


def test_what_breaks_is_a_row():
    def broken(model):
        raise RuntimeError("no kernel image\nfor this device")

    rows = measured(TINY, broken=Implementation(prepare=broken))
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "no kernel image for this device")


LIGER = """
def apply_liger_kernel_to_llama(**options):
    from transformers.models.qwen2 import modeling_qwen2 as home
    class Changed(home.Qwen2RMSNorm):
        def forward(self, x):
            return super().forward(x) * {factor}
    home.Qwen2RMSNorm = Changed
def apply_liger_kernel_to_qwen2(**options): pass
"""


@pytest.mark.parametrize("factor, status", [(1, "ok"), (None, "failed")])
def test_a_peer_takes_its_turns_in_a_process_of_its_own(tmp_path, monkeypatch, factor, status):
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("")
    source = LIGER.format(factor=factor) if factor else "raise OSError('no driver')"
    (tmp_path / "liger_kernel" / "transformers.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = measured(TINY, liger=Implementation(peer="liger", narrow=True, is_opaque=True))["liger"]
    assert row["status"] == status, row
    if status == "ok":
        assert len(row["rounds_ms"]) == 5 and row["saved_mib"] > 0 and row["error"] < 1e-5
    else:
        assert "no driver" in row["reason"]
    assert type(stock(TINY, "cpu").model.norm).__name__ == "Qwen2RMSNorm"  # nothing has changed here


def test_what_is_missing_says_so():
    ia3 = replace(TINY, method="ia3", rank=0)
    reasons = {name: one.why_not(ia3, "cpu") for name, one in IMPLEMENTATIONS.items()}
    assert (
        reasons["frozen"] is reasons["peft"] is reasons["fused"] is reasons["fused_torch"] is reasons["compile"] is None
    )
    assert "needs a GPU" in reasons["fused_triton"] and "GPU" in reasons["graphs"]
    assert reasons["composite"] == reasons["manual"] == "has LoRA alone, not ia3"
    assert "the same as peft" in reasons["peft_bf16"]
    for name in ("liger", "unsloth"):
        assert reasons[name].startswith("not installed: ") or reasons[name] == "needs a GPU"


def test_dimensions_are_those_of_the_published_models():
    found = {name: dimensions(name) for name in MODELS}
    assert found["qwen-vl-chat"]["intermediate"] == found["llava-1.5-7b"]["intermediate"] == 11008
    assert (found["qwen2.5-vl-72b"]["hidden"], found["qwen2.5-vl-72b"]["kv_heads"]) == (8192, 8)
    assert found["internvl3-8b"] == {**found["qwen2.5-vl-7b"], "vocab": found["internvl3-8b"]["vocab"]}
    model = stock(TINY, "cpu")
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert linears == TINY.parameters


def test_the_first_cases_show_the_most():
    cases = suite_cases("cpu", ["step", "layer"], MODELS, ["lora", "ia3", "prefix"], ["bf16", "fp32"])
    assert len(set(cases)) == len(cases)
    everything = {one for case in cases for one in features(case) if isinstance(one[0], str)}
    first = cases[: len(MODELS) + 1]  # no setting has more values than there are models
    assert {one for case in first for one in features(case) if isinstance(one[0], str)} == everything
    assert cases[0].flops == min(case.flops for case in cases)


class Clock:
    """A machine of known rates."""

    device, bytes_per_s = "cpu", 1e10
    flops_per_s = MappingProxyType({"fp32": 1e10, "bf16": 1e10})

    def __init__(self, free=1e12):
        self._free = free

    def free_bytes(self):
        return self._free


def test_a_budget_leaves_out_what_is_too_long_or_too_large_and_says_so(monkeypatch):
    cases = suite_cases("cpu", ["step", "layer"], ["internvl3-1b", "llava-1.5-7b"], ["lora"], ["fp32"])
    emitted = []
    monkeypatch.setattr(runs, "measure", lambda case, *args, **kwargs: [{"case": case.name(), "p50_ms": 1.0}])
    runs.run_cases(cases, named(["fused"]), runs.Budget(60.0, Clock()), "cpu", emitted.extend)
    summary = emitted[-1]
    assert summary["mode"] == "left out" and summary["left_out"]["time"] + len(emitted) - 1 == len(cases)
    assert 1 < len(emitted) < len(cases)
    assert "model llava-1.5-7b" in summary["unseen"] and "model llava-1.5-7b" in runs.left_out_text(summary)
    emitted.clear()
    runs.run_cases(cases, named(["fused"]), runs.Budget(1e9, Clock(free=1e9)), "cpu", emitted.extend)
    assert "memory" in emitted[-1]["left_out"] and "time" not in emitted[-1]["left_out"]
    assert "compile" in runs.Budget(100.0, Clock()).slow_to_start(named(["compile"]))
    assert not runs.Budget(1000.0, Clock()).slow_to_start(named(["compile"]))


def test_random_shapes_cover_what_they_should_and_repeat():
    found = [random_case(7, i, "fp32") for i in range(400)]
    assert found == [random_case(7, i, "fp32") for i in range(400)]
    assert {case.method for case in found} == set(METHODS)
    for field, low, high in (("hidden", 64, 4096), ("tokens", 1, 4096), ("rank", 0, 512)):
        values = [getattr(case, field) for case in found]
        assert low <= min(values) and max(values) <= high + 3 and len(set(values)) > 30, field
    assert all(case.hidden % case.heads == 0 and case.heads % case.kv_heads == 0 for case in found)
    assert any(case.kv_heads < case.heads for case in found) and any(case.tokens < 4 for case in found)


def test_a_sweep_goes_on_where_it_stopped(tmp_path, quick_machine):
    path = tmp_path / "rows" / "sweep.jsonl"
    said = []
    emit = runs.saved_to(path, said.append)

    budget = runs.Budget(60.0, runs.Machine("cpu", ["fp32"]))

    def swept(count):
        shapes = [random_case(3, i, "fp32") for i in range(count)]
        return runs.sweep(shapes, 3, named(["fused"]), budget, "cpu", runs.rows_so_far(path), emit)

    swept(2)
    first = len(said)
    assert {row["shape"] for row in said} == {0, 1} and first == 6
    rows = swept(3)
    assert {row["shape"] for row in said[first:]} == {2} and {row["shape"] for row in rows} == {0, 1, 2}
    assert [json.loads(line)["shape"] for line in path.read_text().splitlines()] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def row_of(shape, name, ms, kept, status="ok", noise=0.02):
    times = [ms * (1 + 0.001 * i) for i in range(7)]
    row = {"shape": shape, "case": f"shape {shape}", "implementation": name, "status": status, "saved_mib": kept}
    return row | ({"rounds_ms": times, "noise": noise} if status == "ok" else {"reason": "too far off"})


def test_faults_of_a_sweep_are_what_is_slower_keeps_more_or_is_wrong():
    rows = [row_of(i, "peft", 10.0, 5.0) for i in range(5)]
    rows += [row_of(0, "fused", 9.0, 4.0), row_of(1, "fused", 12.0, 4.0), row_of(2, "fused", 10.1, 6.0)]
    rows += [row_of(3, "fused", 10.1, 5.0), row_of(4, "fused", 0.0, 0.0, status="refused")]
    assert [line.split(":")[0] for line in runs.faults(rows)] == ["shape 1", "shape 2", "shape 4"]


def test_exponents_are_those_of_powers():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    with pytest.raises(ValueError, match="two sizes"):
        exponent([2, 2], [1, 1])
    rows = [
        {"growth": "tokens", "seq_len": n, "implementation": name, "p50_ms": ms, "saved_mib": 2.0 * n}
        for n in (8, 16, 32)
        for name, ms in (("peft", float(n)), ("fused", 0.1 * n * n))
    ]
    lines = growth_lines(rows, "tokens")
    assert any("fused" in line and "tokens^2.00" in line and "kept bytes as tokens^1.00" in line for line in lines)
    assert lines[-1] == "tokens: fused is no faster than peft at tokens 16, 32"


@pytest.mark.parametrize("axis, field", [("tokens", "seq_len"), ("rank", "rank"), ("layers", "layers")])
def test_growth_goes_along_one_axis(axis, field):
    found = growth_cases(TINY, axis, "cpu")
    assert len({getattr(case, field) for case in found}) == len(found) > 3
    assert {replace(case, **{field: 1}) for case in found} == {replace(TINY, **{field: 1})}


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "--seconds", "0"], "--seconds: expected at least 1, got 0"),
        (["run", "--seconds", "nan"], "--seconds: expected at least 1, got nan"),
        (["run", "--device", "tpu"], "--device: expected auto, cpu or"),
        (["run", "--dtype", "int8"], "--dtype: expected some of bf16, fp16, fp32, got int8"),
        (["run", "--what", "epoch"], "--what: expected some of step, layer, op, got epoch"),
        (["run", "--models", "gpt"], "--models: expected some of llava-1.5-7b"),
        (["run", "--methods", "no-such-method"], "--methods: expected some of"),
        (["run", "--implementations", "magic"], "--implementations: expected some of frozen"),
        (["run", "--growth", "width"], "--growth: expected some of tokens, rank, layers, got width"),
        (["run", "--growth", "--sweep", "3"], "--growth, --sweep: expected one of them, got both"),
        (
            ["run", "--growth", "rank", "--methods", "ia3"],
            "--growth: expected a method with a rank for rank",
        ),
        (["compare", "nothing.jsonl", "nothing.jsonl"], "nothing.jsonl: No such file or directory"),
        (["report", "nothing.jsonl"], "nothing.jsonl: No such file or directory"),
    ],
)
def test_bad_input_is_one_sentence(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", *words]) == 2
    out, error = capsys.readouterr()
    assert not out and error.startswith(f"error: {said}") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_runs_growth_and_sweep_to_the_end(tmp_path, capsys, quick_machine, monkeypatch):
    path = tmp_path / "rows.jsonl"
    assert cli.main(["bench", "run", "--seconds", "1", "--models", "llava-1.5-7b", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "bf16 10 GFLOP/s" in out and "for want of time" in out and "not seen at all" in out
    assert [json.loads(line)["mode"] for line in path.read_text().splitlines()] == ["machine", "left out"]

    tiny = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "has_bias": True, "vocab": 50}
    monkeypatch.setattr("bench.suite.cases.dimensions", lambda model: tiny)
    monkeypatch.setattr("bench.suite.trials.Trial.work", lambda trial: {"flops": 1, "bytes": 1})
    assert (
        cli.main(["bench", "run", "--growth", "layers", "--seconds", "100", "--dtype", "fp32", "--out", str(path)]) == 0
    )
    out = capsys.readouterr().out
    assert "layers: fused      time grows as layers^" in out and "(1 to 8)" in out
    words = ["bench", "run", "--sweep", "2", "--seconds", "100", "--dtype", "fp32", "--out", str(path)]
    assert cli.main(words) == cli.main(words) == 0
    assert capsys.readouterr().out.count("2 of 2 shapes measured") == 2
    assert cli.main(["bench", "run", "--list", "--what", "op", "--models", "internvl3-1b", "--methods", "ia3"]) == 0
    assert all("swiglu_ia3_down" in line for line in capsys.readouterr().out.splitlines())
    assert cli.main(["bench", "report", str(path), "--output", str(tmp_path)]) == 0
    assert "<h2>Growth of" in (tmp_path / "suite.html").read_text()


def test_without_a_checkout_the_door_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "bench")
    monkeypatch.setattr(benchmarks, "__file__", str(tmp_path / "mmpeft_fast" / "benchmarks.py"))
    assert cli.main(["bench", "run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: bench: expected a checkout of the repository") and error.count("\n") == 1


def test_the_door_finds_the_checkout_from_anywhere(tmp_path):
    code = "import sys; from mmpeft_fast import cli; sys.exit(cli.main(['bench', 'run', '--seconds', '0']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "error: --seconds: expected at least 1, got 0")

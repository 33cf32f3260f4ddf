"""The GPU program without a GPU: everything but the launch of its kernels, and those in Triton's interpreter."""

import importlib.util
import itertools
import json
import signal
import sys

import pytest
import torch

from bench.gpu import checks, command, gemms, judge, model_cases, models, op_times, peers, step_times, tuning
from bench.gpu.budget import Budget
from bench.gpu.build import Build
from bench.gpu.kernel_cases import kernel_cases
from bench.gpu.machine import clocks
from bench.gpu.op_cases import op_cases
from bench.gpu.results import Results
from bench.gpu.shapes import DIMS, linear_calls
from bench.gpu.timing import interleaved_ms
from bench.gpu.tunables import TUNABLES, Problem
from bench.gpu.workers import run_items
from mmpeft_fast.ops import dispatch, kernels_torch
from mmpeft_fast.ops.fused_linear import fused_linear_ref
from mmpeft_fast.ops.segments import Branch, Segment
from tests.closeness import assert_exact

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_unused_time_goes_to_later_sections():
    now = [100.0]
    budget = Budget(100, {"a": 1, "b": 1, "c": 2}, clock=lambda: now[0])
    assert budget.allowed("a") == 25
    now[0] += 5
    assert budget.used == 5 and budget.allowed("b") == pytest.approx(95 / 3)
    now[0] += 200
    assert budget.left == 0 and budget.allowed("c") == 0
    with pytest.raises(ValueError, match=r"expected positive seconds and shares, got 0 and \{'a': 1\}"):
        Budget(0, {"a": 1})


def test_results_are_whole_at_any_time(tmp_path):
    now = [0.0]
    results = Results(tmp_path / "deep" / "gpu.json", clock=lambda: now[0])
    results.add("checks", {"ok": True})
    assert json.loads(results.path.read_text())["sections"] == {}
    now[0] += 60
    results.add("checks", {"ok": False})
    assert [row["ok"] for row in json.loads(results.path.read_text())["sections"]["checks"]["rows"]] == [True, False]
    assert [path.name for path in results.path.parent.iterdir()] == ["gpu.json"]


class Rows:
    def __init__(self):
        self.found: list[tuple[dict, dict]] = []

    def __call__(self, item, row):
        self.found.append((item, row))


def test_workers_survive_errors_and_crashes(tmp_path):
    rows, items = Rows(), [{"s": '[{"a": 1}, {"a": 2}]'}, {"s": "broken"}, {"s": '[{"a": 3}]'}]
    assert run_items("json:loads", items, rows, seconds=60, log=tmp_path / "log") == []
    assert [row.get("a") for _, row in rows.found] == [1, 2, None, 3]
    assert rows.found[2][1]["error"].startswith("JSONDecodeError: Expecting value")
    assert "Traceback" in (tmp_path / "log").read_text()
    rows = Rows()
    assert run_items("os:_exit", [{"status": 3}, {"status": 4}], rows, seconds=60, log=tmp_path / "log") == []
    assert [row["error"] for _, row in rows.found] == [f"the process died with status {code}" for code in (3, 4)]


def test_workers_are_ended_in_time(tmp_path):
    rows, sleep = Rows(), {"args": ["sleep", "600"]}
    options = {"log": tmp_path / "log", "num_processes": 2}
    assert run_items("subprocess:run", [sleep] * 2, rows, seconds=60, item_seconds=0.5, **options) == []
    assert [row["error"] for _, row in rows.found] == ["ran longer than 0.5 s"] * 2
    rows = Rows()
    items = [{"args": ["sleep", f"60{i}"]} for i in range(4)]
    left = run_items("subprocess:run", items, rows, seconds=0.5, **options)
    assert sorted(map(repr, left)) == sorted(map(repr, items)) and not rows.found
    assert run_items("subprocess:run", [sleep], rows, seconds=0, **options) == [sleep]


def test_a_build_that_fails_is_a_row(tmp_path):
    row = Build(tmp_path / "log", [sys.executable, "-c", "import sys; print('no'); sys.exit(3)"]).finish(60)
    assert (row["ok"], row["reason"]) == (False, "status 3; see log") and "no" in (tmp_path / "log").read_text()
    assert Build(tmp_path / "log", ["sleep", "60"]).finish(0.2)["reason"] == "not done after 0 s"
    assert Build(tmp_path / "log", ["true"]).finish(60)["ok"]


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


def program(tmp_path, **shares):
    (tmp_path / "logs").mkdir()
    lines = []
    made = command.Program(tmp_path, Budget(120, shares), say=lines.append, device="cpu")
    made.results.data["machine"] = {"device": "NVIDIA Test GPU"}
    return made, lines


def test_sections_run_in_order_until_a_signal(tmp_path, monkeypatch):
    made, lines = program(tmp_path, build=1, checks=1, tiles=1)

    def checked(program):
        program.results.add("checks", {"ok": True})
        signal.raise_signal(signal.SIGINT)
        return "never said"

    def build(program):
        raise TypeError("no such thing")

    monkeypatch.setitem(command._RUN, "build", build)
    monkeypatch.setitem(command._RUN, "checks", checked)
    command.run_sections(made, ["build", "checks", "tiles"])
    written = json.loads(made.results.path.read_text())["sections"]
    assert {name: section["state"] for name, section in written.items()} == {"build": "failed", "checks": "stopped"}
    assert written["checks"]["rows"] == [{"ok": True}] and written["build"]["outcome"] == "TypeError: no such thing"
    assert any("checks: stopped by a signal" in line for line in lines)
    assert len(made.machine["clocks"]) == 3 and (clocks() == {} or "clocks.sm" in clocks())


def test_an_ops_section_writes_rows_and_table(tmp_path, monkeypatch):
    made, lines = program(tmp_path, ops=1)
    item = {
        "case": "o", "method": "lora", "r": 3, "dropout": 0.0, "dims": "tiny", "tokens": 5, "providers": ["torch"],
        "device": "cpu", "tuned_folder": None, "dtype": "fp32", "rounds": 3,
    }  # fmt: skip
    monkeypatch.setattr(op_times, "items", lambda *arguments: [item, {**item, "case": "nothing"}])
    command.run_sections(made, ["ops"])
    rows = json.loads(made.results.path.read_text())["sections"]["ops"]["rows"]
    assert {row["implementation"] for row in rows[:-1]} == {
        "frozen", "peft", "peft_bf16", "unsloth_style", "lorafusion_style", "torch"
    }  # fmt: skip
    assert rows[-1]["case"] == "nothing" and "KeyError" in rows[-1]["error"]
    assert (tmp_path / "tuned" / "nvidia-test-gpu.json").exists()
    assert "ops: 7 rows, 0 cases not run" in lines[-1]


@needs_triton
@pytest.mark.parametrize("kernel", TUNABLES)
def test_candidates_are_tiles_and_every_problem_has_its_trials(kernel):
    from mmpeft_kernels.lowrank_gemm import GemmTile
    from mmpeft_kernels.tile import Tile

    trials = tuning.trials(kernel)
    keys = {tuning.compile_key(kernel, Problem(*trial["problem"])) for trial in trials}
    assert {tuning.compile_key(kernel, problem) for problem in tuning.problems(kernel)} == keys
    tiles = [trial["tile"] for trial in trials]
    assert tiles.count(None) == len(keys) and len(tiles) > 2 * len(keys)
    for fields in tiles:
        if fields is not None:
            tile = (GemmTile if "gemm" in kernel else Tile)(**fields)
            assert tile.block_m * tile.block_n <= 128 * 256
    first = [problem.r for problem in tuning.problems(kernel)[:8]]
    assert set(first) == {16}
    assert len({json.dumps(trial) for trial in trials}) == len(trials)


def test_layers_calls_have_the_models_shapes():
    llama, qwen = linear_calls(DIMS["llama-7b"]), linear_calls(DIMS["qwen2.5-7b"])
    assert llama["qkv"].num_outs == (4096, 4096, 4096) and qwen["qkv"].num_outs == (3584, 512, 512)
    assert qwen["qkv"].bias and not llama["qkv"].bias
    assert llama["down"].width == 11008 and qwen["gate_up"].num_outs == (18944, 18944)
    assert all(sum(call.num_outs) % 8 == 0 for call in (*llama.values(), *qwen.values()))


def test_every_way_of_the_gemm_multiplies_the_same():
    operands = gemms.forward_operands(7, 33, (5, 12), 3, dtype=torch.float64, device="cpu")
    assert_exact(gemms.layout(operands), gemms.composite(operands))
    weight, blocks = operands.weight.split((5, 12)), operands.z.split(3, dim=1)
    up = operands.up.split((5, 12))
    expected = torch.cat([operands.x @ w.t() + 2.0 * z @ u.t() for w, z, u in zip(weight, blocks, up)], dim=1)
    assert_exact(gemms.composite(operands), expected)
    dx = gemms.dx_operands(7, 33, 5, dtype=torch.float64, device="cpu")
    assert_exact(gemms.composite(dx), gemms.bare(dx))
    assert gemms.num_flops(operands) == 2 * 7 * 33 * 17


def by_name(cases, *names):
    found = {case.name: case for case in cases}
    return [found[name] for name in names]


def test_names_of_checks_are_unique_and_found():
    for cases in (list(kernel_cases()), list(op_cases())):
        assert len({case.name for case in cases}) == len(cases)
        assert {op for case in cases for op in case.ops} <= set(dispatch.OPS)
    items = checks.items(["torch", "triton"], ["layout", "triton", "gluon"], "cpu")
    assert {item["dtype"] for item in checks.items(["cuda"], [], "cpu")} == {"bf16", "fp16"}
    assert checks.items([], [], "cpu") == []
    assert len({json.dumps(item) for item in items}) == len(items)
    everything = [*items, *checks.test_files(), *checks.extension_tests()]
    assert {item["kind"] for item in everything} == set(checks._KINDS)
    assert len(checks.test_files()) >= 10


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_checks_run_on_the_torch_provider(dtype):
    names = (
        "prologue rms_norm branch dropout 7x130x33x3", "prologue_backward swiglu scale branch dropout 1x33x130x1",
        "lowrank_gemm 3 segments 33x72x200x20", "lowrank_gemm_dx into 130x7x48x5", "dy_pass 2 segments tanh 7x130x33x3",
        "post_branch dropout 33x72x200x20", "heads scales 2x17x5x5x24", "prefix 2x4x2x33x20x24", "cross_entropy 7x130",
    )  # fmt: skip
    for name in names:
        (row,) = checks.run("kernel", name, dtype, "torch", "cpu")
        assert row["ok"] and row["repeats"] and row["rests"], row
    for name in ("fused_linear lora qkv 17x130x72x20", "attention gqa prefix mask", "linear_cross_entropy 1x33x40"):
        (row,) = checks.run("op", name, dtype, "torch", "cpu")
        assert row["ok"] and row["error"] > 0, row
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_wrong_result_is_seen():
    (case,) = by_name(kernel_cases(), "lowrank_gemm 1 segments 33x72x200x20")
    operands = case.operands(torch.bfloat16, "cpu")
    eager = case.run(kernels_torch, **operands)
    truth = case.run(kernels_torch, **judge.widened(operands))
    assert judge.verdict(eager, eager, truth)["ok"] and judge.same_bits(eager, eager)
    for wrong in (eager["y"] * 1.02, eager["y"].clone().fill_(float("nan")), None):
        row = judge.verdict({"y": wrong}, eager, truth)
        assert not row["ok"] and row["reason"] and row["output"] == "y"
    nudged = eager["y"].clone()
    nudged[0, 0] = -nudged[0, 0]
    assert not judge.same_bits(eager, {"y": nudged})


def test_copies_keep_strides_and_shared_buffers():
    buffer = torch.randn(4, 7)
    first, second = judge.cloned({"parts": buffer.split((3, 4), dim=1)})["parts"]
    assert first.stride() == (7, 1) and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert torch.equal(torch.cat((first, second), dim=1), buffer)
    first.zero_()
    assert buffer[:, :3].any()


def test_a_fused_model_is_compared():
    row = model_cases.compare("qwen2_vl ia3", torch.bfloat16, "torch", "cpu")
    assert row["ok"] and row["repeats"] and row["eager_error"] > 0


@needs_triton
def test_launches_of_the_checks_and_the_tuner_in_the_interpreter(tmp_path):
    """What hands tiles to kernels, in processes where Triton interprets; never bf16 there."""
    options = {"seconds": 120, "log": tmp_path / "log", "environment": {"TRITON_INTERPRET": "1"}}
    tile = {"block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 1}
    gemm = {**tile, "block_k": 16}
    trials = [
        {"kernel": kernel, "problem": ["tiny", call, 5, 2], "tile": gemm if "gemm" in kernel else tile}
        for kernel, call in zip(TUNABLES, itertools.cycle(("qkv", "down")))
        if "gluon" not in kernel
    ]
    rows = Rows()
    items = [{**trial, "dtype": "fp32", "device": "cpu"} for trial in trials]
    assert run_items("bench.gpu.tuning:try_tile", items, rows, **options) == []
    assert len(rows.found) == len(items) and all(row.get("ok") for _, row in rows.found), rows.found
    items = [
        {"kind": kind, "name": name, "dtype": "fp32", "provider": "triton", "device": "cpu"}
        for kind, name in (
            ("kernel", "prologue swiglu scale branch dropout 7x130x33x3"),
            ("op", "fused_linear lora gate_up 1x33x40x3"), ("gemm", "triton 0"), ("gemm", "layout 0"),
        )
    ]  # fmt: skip
    rows = Rows()
    assert run_items("bench.gpu.checks:run", items, rows, **options) == []
    assert len(rows.found) == 5 and all(row.get("ok") for _, row in rows.found), rows.found


@pytest.mark.parametrize("style", peers.STYLES)
def test_peers_compute_lora(style):
    torch.manual_seed(0)
    x, weight, bias, down, up = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 7), (6, 7), (6,), (3, 7), (6, 3))
    )
    trained = [tensor.requires_grad_() for tensor in (x, down, up)]
    y = peers.linear(style, x, weight, bias, down, up, scaling=1.7, dropout=0.0)
    (expected,) = fused_linear_ref(x, [Segment(weight, bias, (Branch(down, up, 1.7),))])
    assert_exact(y, expected)
    dy = torch.randn(y.shape, dtype=torch.float64)
    for got, true in zip(torch.autograd.grad(y, trained, dy), torch.autograd.grad(expected, trained, dy)):
        assert_exact(got, true)


def test_functions_take_turns():
    order = []
    functions = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = interleaved_ms(functions, device="cpu", rounds=3, warmup=1)
    assert order == ["a", "b"] * 4 and {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    times = interleaved_ms(functions, device="cpu", rounds=100, warmup=0, seconds=0)
    assert len(times["a"]) == 3


@pytest.mark.parametrize("case, method", [("qkv", "lora"), ("down", "adapter"), ("down", "ia3"), ("norm", "")])
def test_op_rows(case, method):
    rank = 3 if method in ("lora", "adapter") else 0
    rows = list(op_times.run(case, "tiny", 6, method, rank, 0.1, ["torch"], "cpu", None, dtype="fp32", rounds=3))
    assert all(row["p50_ms"] > 0 and row["op"] in dispatch.OPS and "error" not in row for row in rows)
    assert {"frozen", "torch"} <= {row["implementation"] for row in rows}
    fused = next(row for row in rows if row["implementation"] == "torch")
    assert fused["x_frozen"] > 0 and fused["saved_mib"] > 0 and (case == "norm") == ("tflops" not in fused)


@pytest.mark.parametrize("kernel", ["prologue", "prologue_backward", "dy_pass", "ddown", "lowrank_gemm fwd"])
def test_rows_of_a_problem_say_how_fast(kernel):
    """Without tiles: what is timed beside them."""
    rows = list(tuning.time_tiles(kernel, ["tiny", "gate_up", 5, 2], [], "fp32", "cpu"))
    assert [row["tile"] for row in rows] == (["torch", "bare", "layout"] if "gemm" in kernel else ["torch"])
    speed = "tflops" if "gemm" in kernel else "gb_s"
    assert all(row[speed] > 0 and row["sizes"]["m"] == 5 for row in rows)
    if kernel == "dy_pass":  # dy and U, a and da, dU
        num_bytes = 4 * (5 * 48 + 2 * 48 * 2 + 2 * 5 * 4)
        assert rows[0]["gb_s"] == pytest.approx(num_bytes / rows[0]["p50_ms"] / 1e6)


def test_every_op_item_names_a_case():
    for item in op_times.items(["torch"], "cpu", None):
        assert item["case"] in linear_calls(DIMS[item["dims"]]) or item["case"] in op_times._REGISTRY


def tiny_setting(family):
    return models.Setting(
        name=f"tiny {family}", family=family, size="tiny", batch_size=2, length=90,
        num_image_tokens={"llava": 64, "qwen2_5_vl": 16}[family], supervised=0.1, r=3, dropout=0.05, num_layers=2,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", [*models.STOCK, "torch", "triton", "default"])
def test_steps_of_every_implementation(implementation):
    setting = tiny_setting("llava")
    if implementation == "compile":  # compiling takes longer than all the rest
        model = models.implement(models.build(setting, torch.bfloat16, "cpu"), setting, implementation)
        compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
        assert len(compiled) == 2 and all(type(module).__name__ == "LlamaDecoderLayer" for module in compiled)
        return
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    (row,) = step_times.run_step(setting, implementation, "cpu", None, rounds=1)
    assert "error" not in row and row["tokens_s"] == pytest.approx(180 / row["p50_ms"] * 1e3)
    assert 4.0 < row["first_loss"] < 4.6 and row["saved_mib"] > 0 and row["dense_tflops"] > 0
    assert row["supervised_tokens_s"] == pytest.approx(row["tokens_s"] * 18 / 180)


def test_a_layer_of_a_model_with_mrope():
    names = ["frozen", "peft", "torch"]
    rows = list(step_times.run_layer(tiny_setting("qwen2_5_vl"), names, "cpu", None, rounds=3))
    assert [row["implementation"] for row in rows] == names and rows[0]["x_frozen"] == 1.0
    assert rows[2]["saved_mib"] < rows[1]["saved_mib"] and not any("error" in row for row in rows)


def test_a_frozen_model_has_gradients_at_its_input_alone():
    setting = tiny_setting("qwen2_5_vl")
    model = models.implement(models.build(setting, torch.float32, "cpu"), setting, "frozen")
    inputs = models.batch(setting, model.config, torch.float32, "cpu")
    seen = []

    def watch(module, given, out):
        out.register_hook(seen.append)

    model.get_input_embeddings().register_forward_hook(watch)
    models.step(model, inputs, "frozen")()
    assert seen[0].shape == (2, 90, 256) and seen[0].any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_settings_are_published_models_and_ratios_stay_within_one():
    for setting in models.SETTINGS:
        assert setting.size in models.FAMILIES[setting.family].sizes
        assert setting.num_image_tokens < setting.length
    items = step_times.step_items([*models.STOCK, "torch", "triton", "cuda", "default"], "cuda", None)
    assert len(items) == len(models.SETTINGS) * 10 and items[0]["implementation"] == "frozen"
    rows = [
        {"name": "a", "implementation": "frozen", "p50_ms": 2.0},
        {"name": "a", "implementation": "torch", "p50_ms": 3.0},
        {"name": "b", "implementation": "torch", "p50_ms": 3.0},
        {"setting": "b", "implementation": "frozen", "error": "OutOfMemoryError"},
    ]
    assert [row.get("x_frozen") for row in step_times.with_ratios(rows)] == [1.0, 1.5, None, None]


def test_the_extensions_tests_have_to_run_to_pass():
    """Where nothing is built for a GPU all of them are skipped: that proves nothing."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the tests run")
    (item,) = [item for item in checks.extension_tests() if "sanitizer" not in item["name"]]
    (row,) = checks.run(**item)
    assert not row["ok"] and "skipped" in row["reason"]

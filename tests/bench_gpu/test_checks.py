"""Checks on the torch provider, and what a check sees."""

import json
import re

import pytest
import torch

from bench.gpu import checks, judge, model_cases
from bench.gpu.kernel_cases import kernel_cases, layout
from bench.gpu.op_cases import op_cases, timed_cases
from mmpeft_fast.ops import dispatch, kernels_torch


def named(cases, name):
    return next(case for case in cases if case.name == name)


def test_names_of_checks_are_unique_and_found():
    for cases in (list(kernel_cases()), list(op_cases())):
        assert len({case.name for case in cases}) == len(cases)
        assert {op for case in cases for op in case.ops} <= set(dispatch.OPS)
    assert {op for case in op_cases() for op in case.ops} == set(dispatch.OPS)
    items = checks.items("triton", "bf16", "cpu", ["layout", "triton", "gluon"])
    everything = [*items, *checks.extension_items("cpu")]
    assert {item["kind"] for item in everything} == set(checks._KINDS)
    assert len({json.dumps(item) for item in everything}) == len(everything)
    # Where time runs out, every kind has had some.
    assert {item["kind"] for item in items[:4]} == {"model", "kernel", "op", "gemm"}
    assert len(checks.items("triton", "bf16", "cpu", ["layout"], few=1)) == 4


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_checks_run_on_the_torch_provider(dtype):
    ragged = [case for case in kernel_cases() if int(re.search(r" (\d+)x", case.name)[1]) < 100]
    assert {case.name.rsplit(" ", 4)[0] for case in ragged} == {
        "prologue", "prologue_backward", "shrink", "ddown", "dy_pass", "lowrank_gemm fwd", "lowrank_gemm dx",
        "masked_dx",
    }  # fmt: skip
    for case in ragged:
        (row,) = checks.run("kernel", case.name, dtype, "torch", "cpu")
        assert row["ok"] and row["repeats"] and row["rests"], row
    for name in ("fused_linear lora qkv 17x130x72x20", "attention gqa prefix mask", "attention gqa norms",
                 "linear_cross_entropy 1x33x40"):  # fmt: skip
        (row,) = checks.run("op", name, dtype, "torch", "cpu")
        assert row["ok"] and row["error"] > 0, row
    rows = list(checks.run("gemm", "layout 1", dtype, "torch", "cpu"))
    assert [row["rests"] for row in rows] == [["gemm:layout"]] and rows[0]["ok"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_adapters_in_another_dtype_are_part_of_a_case():
    case = named(kernel_cases(), "dy_pass rms_norm 7x33x185 r3 p0.1")
    operands = case.operands(torch.bfloat16, "cpu", torch.float32)
    assert operands["up"].dtype == torch.float32 and operands["dy"].dtype == torch.bfloat16
    assert checks.judged_case(case, kernels_torch, operands)["ok"]
    linear = next(timed_cases("tiny", 3, 20, 0.1))
    (down, _), *_ = linear.operands(torch.bfloat16, "cpu", torch.float32)["branches"]
    assert down[0].dtype == torch.float32


def test_a_missing_provider_says_nothing_about_its_ops():
    (row,) = checks.run("kernel", "any", "bf16", "cuda", "cpu")
    assert row["unfinished"] and not row["ok"] and row["error"]


def test_a_wrong_result_is_seen():
    case = named(kernel_cases(), "lowrank_gemm fwd none 33x72x400 r20 p0.1")
    operands = case.operands(torch.bfloat16, "cpu")
    eager = case.run(kernels_torch, **operands)
    truth = case.run(kernels_torch, **judge.widened(operands))
    assert judge.verdict(eager, eager, truth)["ok"] and judge.same_bits(eager, eager)
    assert judge.verdict(layout([200, 200], operands), eager, truth)["ok"]
    assert not judge.verdict(layout([100, 300], operands), eager, truth)["ok"]
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


def test_the_extensions_tests_have_to_run_to_pass():
    """Where nothing is built for a GPU all of them are skipped: that proves nothing."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the tests run")
    (row,) = checks._extension("tests/csrc_cuda/test_kernels.py", "", "cuda", "cpu")
    assert not row["ok"] and "skipped" in row["reason"]

"""Whole steps of every implementation on the CPU with tiny models, and where their time goes."""

from pathlib import Path

import pytest
import torch

from bench.gpu import profile, steps, tuned
from bench.gpu.shapes import DIMS, DRY, GPU, SETTINGS, linear_calls
from mmpeft_fast.models import FAMILIES

LLAVA, QWEN = SETTINGS["tiny llava"], SETTINGS["tiny qwen2_5_vl"]


@pytest.mark.parametrize("implementation", ["frozen", "peft", "peft_bf16", "torch", "default"])
def test_steps_of_every_implementation(implementation):
    row, counts = steps.run_step(LLAVA.name, implementation, "bf16", "cpu", rounds=1)
    assert row["tokens_s"] == pytest.approx(180 / row["p50_ms"] * 1e3) and row["host_ms"] > 0
    assert 4.0 < row["first_loss"] < 4.6 and row["dense_tflops"] > 0
    assert row["supervised_tokens_s"] == pytest.approx(row["tokens_s"] * 18 / 180)
    assert counts["saved_mib"] > 0 and counts["launches"] > 100 and counts["us_a_launch"] > 0


def test_adapters_are_what_a_user_gets():
    kinds = {}
    for name in ("peft", "peft_bf16", "torch"):
        model = steps.implement(steps.build(LLAVA, torch.bfloat16, "cpu"), LLAVA, name)
        kinds[name] = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert kinds == {"peft": {torch.float32}, "peft_bf16": {torch.bfloat16}, "torch": {torch.float32}}


def test_a_provider_that_is_not_there_is_an_error():
    with pytest.raises(RuntimeError, match="cuda is not installed: "):
        list(steps.run_step(LLAVA.name, "cuda", "bf16", "cpu"))


def test_a_frozen_model_has_gradients_at_its_input_alone():
    model = steps.implement(steps.build(QWEN, torch.float32, "cpu"), QWEN, "frozen")
    inputs = steps.batch(QWEN, model.config, torch.float32, "cpu")
    seen = []

    def watch(module, given, out):
        out.register_hook(seen.append)

    model.get_input_embeddings().register_forward_hook(watch)
    steps.training_step(model, inputs, "frozen")()
    assert seen[0].shape == (2, 90, 256) and seen[0].any()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_settings_are_published_models():
    for setting in SETTINGS.values():
        assert setting.size in {*FAMILIES[setting.family].sizes, "tiny"} and setting.num_image_tokens < setting.length
    for scope in (GPU, DRY):
        assert {*scope.whole, *scope.short, *scope.text} <= set(SETTINGS)
    for name, (dims, r, m, p) in zip(GPU.whole, GPU.problems):
        setting = SETTINGS[name]
        assert (dims, r, m, p) == (setting.dims, setting.r, setting.batch_size * setting.length, setting.dropout)
    llama, qwen = linear_calls(DIMS["llama-7b"]), linear_calls(DIMS["qwen2.5-7b"])
    assert llama["qkv"].num_outs == (4096, 4096, 4096) and qwen["qkv"].num_outs == (3584, 512, 512)
    assert qwen["qkv"].bias and not llama["qkv"].bias
    assert llama["down"].width == 11008 and qwen["gate_up"].num_outs == (18944, 18944)


def test_a_profile_says_how_far_kernels_are_from_their_bytes():
    model = steps.implement(steps.build(LLAVA, torch.float32, "cpu"), LLAVA, "torch")
    inputs = steps.batch(LLAVA, model.config, torch.float32, "cpu")
    step = steps.training_step(model, inputs, "torch")
    step()
    kernels = [
        ("_prologue_backward_kernel", 2.0),
        ("_prologue_kernel", 1.0),
        ("nvjet_sm90_tst", 3.0),
        ("at::copy", 4.0),
    ]
    rows = list(profile.table_of_kernels(step, profile.Profiled(kernels), {"copy_gb_s": 1e3, "gemm_tflops": 1e-3}))
    assert [row["kernel"] for row in rows] == ["elementwise", "library GEMM", "prologue_backward", "prologue"]
    for row in rows:
        assert row["roofline"] == pytest.approx(row["least_ms"] / row["ms"]) and row["least_gb"] > 0
    # The GEMMs' operations, at this rate, take longer than their bytes.
    assert rows[1]["least_ms"] > 1e3 * rows[1]["least_gb"] / 1e3
    text = profile.markdown([{"name": "tiny", "implementation": "torch", **row} for row in rows])
    assert text.startswith("## tiny: torch, 10.0 ms") and "| prologue | 1 | 1.00 |" in text


def test_bytes_of_a_profile_are_operands_and_results():
    x, w = torch.randn(8, 4), torch.randn(4, 6)
    rates = {"copy_gb_s": 1.0, "gemm_tflops": 1e9}
    counted = profile.Profiled([("cutlass", 1.0), ("at::add", 1.0), ("unknown", 0.5)])
    rows = {row["kernel"]: row for row in profile.table_of_kernels(lambda: (x @ w).t().add(1), counted, rates)}
    assert rows["library GEMM"]["least_gb"] * 1e9 == 4 * (32 + 24 + 48)
    assert rows["elementwise"]["least_gb"] * 1e9 == 4 * (48 + 48) and rows["elementwise"]["count"] == 2


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("_ddown_kernel", "ddown"), ("_dy_pass_kernel", "dy_pass"), ("_lowrank_gemm_kernel", "lowrank_gemm"),
        ("void pytorch_flash::flash_bwd_kernel", "attention"), ("nvjet_sm90_tst_192x160", "library GEMM"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam>", "AdamW"), ("_rotary_kernel", "rotary"),
        ("void mmpeft::cuda::prologue_backward_kernel<__nv_bfloat16, 16>", "prologue_backward"),
    ],
)  # fmt: skip
def test_kernels_are_told_apart(kernel, kind):
    assert profile.kind_of(kernel) == kind


def test_kernels_of_our_own_are_never_among_the_others():
    rows = tuned.read_rows(Path(profile.__file__).parents[1] / "results" / "nvidia-h200" / "rows.jsonl")
    names = {kernel[0] for row in rows for kernel in row.get("kernels", ())}
    ours = {name for name in names if name.startswith("_") or "mmpeft" in name}
    assert len(ours) > 10 and "elementwise" not in {profile.kind_of(name) for name in ours}
    assert {profile.kind_of(name) for name in names if "nvjet" in name} == {"library GEMM"}


def test_a_graph_falls_back_to_the_step_without_a_gpu():
    (row,) = steps.run_graph(LLAVA.name, "frozen", "bf16", "cpu")
    assert row["mode"] == "graph" and row["p50_ms"] > 0

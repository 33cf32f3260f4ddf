"""Choosing a provider; what the providers compute is checked in tests/kernels and tests/csrc."""

import json
import logging

import pytest
import torch

import mmpeft_fast
from mmpeft_fast.ops import csrc, dispatch, kernels_torch, providers
from mmpeft_fast.ops.providers import forced_provider, kernel_set, provider_report

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU of some name, and a folder of tables."""
    caches = (dispatch.tables, dispatch.table_of, dispatch._say_unknown, dispatch._cached_choice)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(dispatch, "tuned_folder", lambda: tmp_path)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def write_table(folder, device, **fields):
    table = {"device": device, "source": "bench/results/x/gpu.json", **fields}
    (folder / f"{dispatch.slug(device)}.json").write_text(json.dumps(table))


def test_forcing_nests(monkeypatch):
    monkeypatch.setattr(providers, "why_not_installed", lambda name: None)
    assert forced_provider() is None
    with mmpeft_fast.provider("triton"):
        assert forced_provider() == "triton"
        with mmpeft_fast.provider("torch"):
            assert forced_provider() == "torch"
            assert kernel_set("fused_linear", torch.empty(2, 2)) is kernels_torch
        assert forced_provider() == "triton"
    assert forced_provider() is None


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"expected one of \[.*'torch'.*\], got 'tpu'"), mmpeft_fast.provider("tpu"):
        pass
    monkeypatch.setattr(providers, "why_not_installed", lambda name: "run: pip install triton")
    with pytest.raises(ValueError, match="got 'triton'; run: pip install triton"), mmpeft_fast.provider("triton"):
        pass
    assert forced_provider() is None


def test_cpu_runs_the_extension_where_it_is(monkeypatch):
    monkeypatch.setattr(csrc, "why_unavailable", lambda: "no compiler")
    for op, name, reason in provider_report("cpu"):
        assert name == "torch" and "no compiler" in reason, op
    monkeypatch.setattr(csrc, "why_unavailable", lambda: None)
    assert {name for _, name, _ in provider_report("cpu")} == {"cpu"}


def test_unknown_gpu_gets_torch_and_layout_while_nothing_is_proven(gpu, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            provider, reason = dispatch.choose("fused_linear", GPU)
    assert provider == "torch" and "proven on no GPU yet" in reason
    assert len(caplog.records) == 1
    assert dispatch.wants_layout(GPU, torch.bfloat16, 4096, 4096, 16)
    assert not dispatch.wants_layout(CPU, torch.bfloat16, 4096, 4096, 16)


def test_unknown_gpu_takes_what_another_gpu_has_proven(gpu):
    write_table(gpu, "NVIDIA A100-SXM4-80GB", providers={"fused_linear": "triton", "attention": "torch"})
    assert dispatch.choose("fused_linear", GPU)[0] == "triton"
    assert dispatch.choose("attention", GPU)[0] == "torch"


def test_known_gpu_takes_what_was_measured_on_it(gpu):
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    key = dispatch.bucket(torch.bfloat16, m=4096, n=12288, k=4096, r=16)
    tile = {"block_m": 64, "block_n": 128, "num_warps": 8}
    write_table(
        gpu, "NVIDIA H100 80GB HBM3", providers={"fused_linear": "triton"}, gemm={f"fwd {key}": "layout"},
        tiles={"prologue": {"bf16 m4096 k4096 r64": tile}},
    )  # fmt: skip
    assert dispatch.choose("fused_linear", GPU) == ("triton", "measured on this GPU: bench/results/x/gpu.json")
    assert dispatch.choose("rms_norm", GPU)[0] == "torch"
    assert dispatch.wants_layout(GPU, torch.bfloat16, 12288, 4096, 16)
    assert not dispatch.wants_layout(GPU, torch.bfloat16, 4096, 4096, 16)
    table = dispatch.table_of(GPU)
    assert table.tiles["prologue"][dispatch.bucket(torch.bfloat16, m=3000, k=4096, r=48)] == tile
    assert dispatch.tile_fields("prologue", x, m=4096, k=4096, r=64) is None  # meta is no GPU
    few, many = (torch.empty(rows, 8, device="meta") for rows in (dispatch.SMALL_M - 1, dispatch.SMALL_M))
    names = [dispatch.default_provider("fused_linear", _on_gpu(x)) for x in (few, many)]
    assert names == ["torch", "triton"]


def _on_gpu(x):
    class OnGpu:
        device, shape = GPU, x.shape

    return OnGpu()


def test_buckets_and_slugs():
    assert dispatch.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert dispatch.bucket(torch.bfloat16, m=3000, k=4096, r=1) == "bf16 m4096 k4096 r1"
    assert dispatch.bucket(torch.float32, m=0) == "fp32 m1"

"""Choosing a provider; what the providers compute is checked in tests/kernels and tests/csrc."""

import importlib.util
import json
import logging

import pytest
import torch
from mmpeft_kernels import tile

import mmpeft_fast
from mmpeft_fast.ops import csrc, dispatch, kernels_torch, providers
from mmpeft_fast.ops.providers import forced_provider, kernel_set, provider_report

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class OnGpu:
    """What dispatch asks of a bfloat16 matrix on the GPU."""

    device, dtype = GPU, torch.bfloat16

    def __init__(self, *shape):
        self.shape = shape


NAME = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a Hopper GPU of some name, and a folder of tables."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch, "tuned_folder", lambda: tmp_path)
    dispatch.read_again()
    tile._architecture_of.cache_clear()
    yield tmp_path
    tile._architecture_of.cache_clear()
    dispatch.read_again()


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


def test_unknown_gpu_gets_triton_and_the_librarys_gemms_and_says_so_once(gpu, caplog):
    with caplog.at_level(logging.WARNING):
        chosen = [dispatch.choose(op, GPU) for op in dispatch.OPS for _ in range(2)]
    assert set(chosen) == {("triton", f"{NAME} is not measured: default tiles, the library's GEMMs")}
    assert [record.getMessage().count(NAME) for record in caplog.records] == [1]
    assert dispatch.wants_layout(GPU, torch.bfloat16, 4096, 4096, 16)
    assert not dispatch.wants_layout(CPU, torch.bfloat16, 4096, 4096, 16)
    x = OnGpu(4096, 4096)
    assert dispatch.gemm_realisation(x, 4096, 16, direction="fwd") == "layout"
    assert dispatch.gemm_realisation(x, 4096, 0, direction="dx") == "composite"
    assert [dispatch.dy_realisation(x, rank) for rank in (16, 32, 64, 128)] == ["triton"] * 2 + ["composite"] * 2
    assert dispatch.tile_fields("prologue", x, m=4096, k=4096, r=16) is None


@pytest.mark.parametrize(
    "capability, knows",
    [((7, 5), False), ((8, 0), True), ((8, 6), True), ((8, 9), True), ((10, 0), True), ((13, 0), False)],
)
def test_torch_is_for_gpus_that_triton_does_not_know(gpu, monkeypatch, caplog, capability, knows):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with caplog.at_level(logging.WARNING):
        provider, reason = dispatch.choose("fused_linear", GPU)
    assert provider == ("triton" if knows else "torch") and len(caplog.records) == 1
    assert (
        knows
        or reason == f"the Triton kernels are not compiled for compute capability {'.'.join(map(str, capability))}"
    )
    assert dispatch.wants_layout(GPU, torch.bfloat16, 4096, 4096, 16) == knows


def test_torch_is_for_machines_without_triton(gpu, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert dispatch.choose("attention", GPU) == ("torch", "triton is not installed")


def test_cuda_needs_its_extension(gpu, monkeypatch):
    write_table(gpu, NAME, providers={"fused_linear": "cuda", "attention": "torch"})
    monkeypatch.setattr(csrc, "why_no_cuda", lambda: "no nvcc")
    provider, reason = dispatch.choose("fused_linear", GPU)
    assert provider == "triton" and "no nvcc" in reason
    monkeypatch.setattr(csrc, "why_no_cuda", lambda: None)
    assert dispatch.choose("fused_linear", GPU)[0] == "cuda"
    assert dispatch.choose("attention", GPU)[0] == "torch"


def test_what_a_table_lacks_takes_the_nearest_measurement_or_the_defaults(gpu, caplog):
    first, other = {"block_m": 64, "block_n": 128, "num_warps": 8}, {"block_m": 32, "block_n": 128, "num_warps": 8}
    write_table(
        gpu, NAME,
        gemm={"fwd bf16 m4096 n4096 k4096 r16": "gluon", "dx bf16 m4096 n4096 k4096 r1": "triton"},
        tiles={
            "prologue": {"bf16 m4096 k4096 r16": first, "bf16 m4096 k16384 r16": other},
            "dy_pass": {"bf16 m4096 n4096 r128": first, "bf16 m4096 n4096 r16": first},
        },
        ways={"dy_pass": {"bf16 m4096 n4096 r16": "composite"}},
    )  # fmt: skip
    x = OnGpu(4096, 4096)
    with caplog.at_level(logging.WARNING):
        assert dispatch.tile_fields("prologue", x, m=4000, k=4096, r=16) == first
        assert dispatch.dy_realisation(x, 16) == "composite"
        assert dispatch.dy_realisation(x, 128) == "triton"  # its tile is listed, and no faster way
        assert dispatch.gemm_realisation(x, 4096, 16, direction="fwd") == "gluon"
        assert dispatch.tile_fields("ddown", x, m=4096, k=4096, r=16) is None  # the default was the fastest
        assert not caplog.records
        assert dispatch.tile_fields("prologue", x, m=2048, k=4096, r=16) == first
        assert len(caplog.records) == 1 and "'bf16 m4096 k4096 r16' stands for it" in caplog.text
        assert dispatch.tile_fields("prologue", x, m=2048, k=32768, r=16) == other
        assert dispatch.tile_fields("prologue", x, m=4096, k=4096, r=64) is None  # another rank is another kernel
        assert dispatch.tile_fields("prologue", x, m=512, k=4096, r=16) is None  # a factor of 8
        assert dispatch.gemm_realisation(OnGpu(8192, 4096), 8192, 16, direction="fwd") == "gluon"
        assert dispatch.gemm_realisation(OnGpu(4096, 4096), 8192, 0, direction="dx") == "triton"
        assert dispatch.gemm_realisation(x, 4096, 64, direction="fwd") == "layout"
        assert dispatch.dy_realisation(x, 64) == "composite"
        assert not dispatch.wants_layout(GPU, torch.bfloat16, 8192, 4096, 16)
        assert dispatch.wants_layout(GPU, torch.bfloat16, 8192, 4096, 64)
    assert len(caplog.records) == 1  # said once for a GPU


def test_known_gpu_takes_what_was_measured_on_it(gpu):
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    key = dispatch.bucket(torch.bfloat16, m=4096, n=12288, k=4096, r=16)
    fields = {"block_m": 64, "block_n": 128, "num_warps": 8}
    write_table(
        gpu, NAME, providers={"fused_linear": "triton", "rms_norm": "torch"}, gemm={f"fwd {key}": "layout"},
        tiles={"prologue": {"bf16 m4096 k4096 r64": fields}},
    )  # fmt: skip
    assert dispatch.choose("fused_linear", GPU) == ("triton", "measured on this GPU: bench/results/x/gpu.json")
    assert dispatch.choose("rms_norm", GPU)[0] == "torch"
    assert dispatch.wants_layout(GPU, torch.bfloat16, 12288, 4096, 16)
    table = dispatch.table_of(GPU)
    assert table.tiles["prologue"][dispatch.bucket(torch.bfloat16, m=3000, k=4096, r=48)] == fields
    assert dispatch.tile_fields("prologue", x, m=4096, k=4096, r=64) is None  # meta is no GPU
    few, many = (OnGpu(rows, 8) for rows in (dispatch.SMALL_M - 1, dispatch.SMALL_M))
    names = [dispatch.default_provider("fused_linear", x) for x in (few, many)]
    assert names == ["torch", "triton"]


def test_tensors_on_no_gpu_take_the_kernels_own_way():
    """Triton's interpreter and recorded launches."""
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    assert dispatch.gemm_realisation(x, 4096, 16, direction="fwd") == "triton"
    assert dispatch.dy_realisation(x, 128) == "triton"


@pytest.mark.parametrize("rank, expected", [(32, "triton"), (64, "library")])
def test_dy_of_large_ranks_goes_to_the_library(gpu, monkeypatch, rank, expected):
    from mmpeft_fast.ops import kernels_triton

    monkeypatch.setattr(dispatch, "dy_realisation", lambda dy, rank: "composite" if rank >= 64 else "triton")
    ran = []
    monkeypatch.setattr(kernels_torch, "dy_pass", lambda *args, **options: ran.append("library") or ([None], [None]))
    monkeypatch.setattr(kernels_triton, "_dy_pass", lambda *args: ran.append("triton") or ([None], [None]))
    dy, a, up = torch.zeros(4, 8), torch.zeros(4, rank), torch.zeros(8, rank)
    options = {"scalings": [1.0], "activations": ["identity"], "need_da": [True], "need_dup": [True]}
    kernels_triton.dy_pass([dy], [a], [up], **options)
    assert ran == [expected]


def test_buckets_and_slugs():
    assert dispatch.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert dispatch.bucket(torch.bfloat16, m=3000, k=4096, r=1) == "bf16 m4096 k4096 r1"
    assert dispatch.bucket(torch.float32, m=0) == "fp32 m1"

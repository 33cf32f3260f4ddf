"""Measuring the machine at hand for a profile: product rates by size, attention, copy bandwidth, cost of a launch."""

import os
import time
from collections.abc import Callable

import torch

from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.plan.devices import GIB, Device

_SIDES = {"cuda": (512, 1024, 2048, 4096, 8192), "cpu": (128, 256, 512, 1024)}
_COPY_BYTES = {"cuda": GIB, "cpu": GIB // 8}
_TOKENS = {"cuda": 4096, "cpu": 512}
_HEADS, _HEAD_DIM = 16, 128
_MIN_SECONDS = 0.05
_ROUNDS = 5
# A Triton launch costs the CPU so many of torch's: 160 us against 30 on an H200's host (bench/results/nvidia-h200).
_TRITON_LAUNCHES = 5


def seconds_of(function: Callable[[], object], device_type: str) -> float:
    """Median seconds of a call, from rounds that each last long enough to be measured."""

    def total(count: int) -> float:
        _synchronize(device_type)
        started = time.perf_counter()
        for _ in range(count):
            function()
        _synchronize(device_type)
        return time.perf_counter() - started

    total(1)
    count = 1
    while (elapsed := total(count)) < _MIN_SECONDS:
        count *= max(2, min(10, int(_MIN_SECONDS / max(elapsed, 1e-9))))
    return sorted(total(count) / count for _ in range(_ROUNDS))[_ROUNDS // 2]


def calibrate(device_type: str, name: str) -> Device:
    """Measures this machine, half a minute at most.

    Args:
        device_type: "cuda" (the current device) or "cpu" (with torch's number of threads).
        name: of the profile.

    Raises:
        ValueError: no such device here.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--calibrate: expected a CUDA device for cuda, torch sees none")
    gemm = {dtype: _gemm_rates(device_type, dtype) for dtype in DTYPES}
    attention, backward = {}, {}
    for dtype in DTYPES:
        attention[dtype], backward[dtype] = _attention_rates(device_type, dtype)
    launch_s, host_s = _launch_seconds(device_type)
    what = _describe(device_type)
    return Device(
        name=name,
        type=device_type,
        memory_bytes=_memory_bytes(device_type),
        reserve_bytes=GIB if device_type == "cuda" else 0,
        bytes_per_s=_copy_rate(device_type),
        gemm=gemm,
        attention=attention,
        attention_backward=backward,
        launch_s=launch_s,
        host_s={"forward": host_s, "backward": host_s, "triton": _TRITON_LAUNCHES * host_s, "graph": launch_s},
        sources={
            "memory": "the system" if device_type == "cpu" else "the driver; 1 GiB of it reserved (assumed)",
            "bandwidth": f"copy of {_COPY_BYTES[device_type] >> 20} MiB, read and written, measured on {what}",
            "gemm": f"square products of side {', '.join(map(str, _SIDES[device_type]))}, measured on {what}",
            "attention": f"causal, {_TOKENS[device_type]} tokens, {_HEADS} heads of {_HEAD_DIM}, measured on {what}",
            "launch_s, host_s": f"an addition of one element, measured on {what}; Triton's launches as "
            f"{_TRITON_LAUNCHES} of torch's, assumed",
        },
    )


def _synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def _describe(device_type: str) -> str:
    from mmpeft_fast.doctor import device_name

    threads = f", {torch.get_num_threads()} threads" if device_type == "cpu" else ""
    return f"{device_name(device_type)}{threads}, torch {torch.__version__}"


def _memory_bytes(device_type: str) -> int:
    if device_type == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _gemm_rates(device_type: str, dtype: str) -> tuple[tuple[float, float], ...]:
    points = []
    for side in _SIDES[device_type]:
        a, b = (torch.randn(side, side, device=device_type).to(DTYPES[dtype]) for _ in range(2))
        seconds = seconds_of(lambda a=a, b=b: a @ b.t(), device_type)
        points.append((2.0 * side**3, 2.0 * side**3 / seconds))
    return tuple(points)


def _attention_rates(device_type: str, dtype: str) -> tuple[float, float]:
    """FLOP/s forward and backward; a causal mask halves the FLOPs."""
    shape = (1, _HEADS, _TOKENS[device_type], _HEAD_DIM)
    q, k, v = (torch.randn(shape, device=device_type).to(DTYPES[dtype]).requires_grad_() for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    forward = seconds_of(lambda: attend(q, k, v, is_causal=True), device_type)
    out = attend(q, k, v, is_causal=True)
    dout = torch.randn_like(out)
    backward = seconds_of(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), device_type)
    flops = 4.0 * _HEADS * shape[2] ** 2 * _HEAD_DIM / 2
    return flops / forward, 2.5 * flops / backward


def _copy_rate(device_type: str) -> float:
    source = torch.randn(_COPY_BYTES[device_type] // 4, device=device_type)
    target = torch.empty_like(source)
    return 2.0 * _COPY_BYTES[device_type] / seconds_of(lambda: target.copy_(source), device_type)


def _launch_seconds(device_type: str) -> tuple[float, float]:
    """(launch_s, host_s): on a GPU the host's cost limits a queue of empty kernels, and a graph of them shows the
    device's; a CPU has one cost."""
    x = torch.zeros(1, device=device_type)
    queued = seconds_of(lambda: x.add_(1.0), device_type)
    if device_type == "cpu":
        return queued, 0.0
    launches = 100
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            x.add_(1.0)
    return seconds_of(graph.replay, device_type) / launches, queued

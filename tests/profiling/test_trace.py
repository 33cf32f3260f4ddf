"""Joining marks with ops and kernels of a Chrome trace."""

import pytest

from mmpeft_fast.profiling.trace import Span, spans


def event(cat: str, name: str, ts: float, dur: float, *, tid: int = 1, correlation: int | None = None) -> dict:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def seconds_and_launches(found: dict) -> dict:
    return {key: (pytest.approx(span.seconds), span.launches) for key, span in found.items()}


def test_on_a_cpu_the_outermost_ops_inside_a_mark_count():
    events = [
        event("user_annotation", "mmpeft_fast 0 gemms: addmm", 10, 20),
        event("cpu_op", "profiler::_record_function_enter_new", 11, 1),
        event("cpu_op", "aten::addmm", 13, 10),
        event("cpu_op", "aten::copy_", 14, 3),
        event("cpu_op", "aten::mul", 25, 2),
        event("cpu_op", "aten::linear", 5, 40),  # around the mark
        event("cpu_op", "aten::addmm", 13, 10, tid=2),  # elsewhere
        event("user_annotation", "mmpeft_fast 7 head: mm", 12, 30, tid=2),
        event("user_annotation", "somebody else's", 13, 1),
        {"ph": "i", "name": "an instant", "ts": 1},
    ]
    inside, outside = spans(events, on_gpu=False)
    assert inside == {0: Span(pytest.approx(12e-6), 1), 7: Span(pytest.approx(10e-6), 1)}
    assert outside == {}


def test_on_a_gpu_kernels_count_for_the_mark_that_launched_them():
    events = [
        event("user_annotation", "mmpeft_fast 0 gemms: mm", 10, 20),
        event("user_annotation", "mmpeft_fast 1 norms: prologue rms_norm", 40, 20, tid=2),
        event("gpu_user_annotation", "mmpeft_fast 0 gemms: mm", 100, 20, tid=70),
        event("cuda_runtime", "cudaLaunchKernel", 15, 2, correlation=5),
        event("cuda_runtime", "cudaMemsetAsync", 18, 2, correlation=6),
        event("cuda_driver", "cuLaunchKernelEx", 45, 2, tid=2, correlation=7),
        event("cuda_runtime", "cudaLaunchKernel", 70, 2, correlation=8),
        event("cpu_op", "aten::mm", 11, 18),
        event("kernel", "gemm", 100, 50, tid=70, correlation=5),
        event("gpu_memset", "Memset", 150, 1, tid=70, correlation=6),
        event("kernel", "triton_prologue", 160, 30, tid=70, correlation=7),
        event("kernel", "nobody's", 200, 4, tid=70, correlation=8),
        event("kernel", "orphan", 210, 1, tid=70, correlation=99),
    ]
    inside, outside = spans(events, on_gpu=True)
    assert inside == {0: Span(pytest.approx(51e-6), 2), 1: Span(pytest.approx(30e-6), 1)}
    assert outside == {"nobody's": Span(pytest.approx(4e-6), 1), "orphan": Span(pytest.approx(1e-6), 1)}

"""The CUDA provider's adaptor: its ops replaced by ones of the same schema on Triton's launchers, in the interpreter.

What is checked here is that operands reach the ops as their schemas say (csrc/cuda/registration.cpp); the kernels
themselves are checked in tests/csrc_cuda.
"""

from types import SimpleNamespace

import pytest
import torch
from mmpeft_kernels import lowrank_gemm as gemm
from mmpeft_kernels.dy_pass import dy_pass
from mmpeft_kernels.segments import SegmentShape

from mmpeft_fast import provider
from mmpeft_fast.ops import csrc, kernels_cuda, providers
from mmpeft_fast.ops.fused_linear import fused_linear
from tests.kernels.interpreted.check_fused_linear import check_against_eager
from tests.ops.calls import make_call

FINE = ("", "")  # nothing refused, nothing failed


def lowrank_gemm_out(x, weight, z, u, scaling, num_outs, ranks, transposed, bias, scale, residual, out):
    segments = [SegmentShape(*pair) for pair in zip(num_outs, ranks, strict=True)]
    gemm.lowrank_gemm(
        x, weight, tile=gemm.default_tile(80, x.element_size()), z=z, u=u, scaling=scaling, segments=segments,
        transposed=transposed, bias=bias, scale=scale, residual=residual, out=out,
    )  # fmt: skip
    return FINE


def dy_pass_op(dy, a, u, num_outs, ranks, scaling, activation, need_da, need_du):
    segments = [SegmentShape(*pair) for pair in zip(num_outs, ranks, strict=True)]
    grads = dy_pass(
        dy, a, u, segments=segments, scaling=scaling, activation=activation, need_da=need_da, need_du=need_du
    )
    return *grads, *FINE


@pytest.fixture
def cuda_provider(monkeypatch):
    ops = SimpleNamespace(lowrank_gemm_out=lowrank_gemm_out, dy_pass=dy_pass_op)
    monkeypatch.setattr(csrc, "_cuda_ops", ops)
    monkeypatch.setattr(kernels_cuda, "unsupported", lambda x: None)
    monkeypatch.setattr(csrc, "why_no_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    providers.log_fallback.cache_clear()


CASES = {
    "lora": {"positions": ("parallel",), "dropout": 0.2, "bias": True, "residual": True},
    "ia3": {"in_scale": True},
    "adapter": {"positions": ("pre", "post"), "activation": "tanh", "dropout": 0.2},
    "two segments": {"positions": ("parallel",), "num_segments": 2},
}


@pytest.mark.parametrize("prologue_name", ["none", "rms_norm", "swiglu"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(cuda_provider, prologue_name, case):
    call = make_call(
        prologue=prologue_name, lead=(17,), width=40, num_out=64, rank=8, dtype=torch.float32, **CASES[case]
    )

    check_against_eager(call, "cuda", kernels_cuda)


def test_what_the_gemm_cannot_take_goes_to_triton_and_is_named(cuda_provider, caplog):
    call = make_call(positions=("parallel",), lead=(17,), width=33, num_out=40, rank=5, dtype=torch.float32)
    with provider("cuda"):
        fused_linear(*call.arguments(), **call.options)
    assert any("rows of 132 bytes" in record.message and "the triton provider does" in record.message
               for record in caplog.records)  # fmt: skip


@pytest.mark.parametrize(("sentences", "kind"), [(("gemm: expected x", ""), ValueError), (("", "no"), RuntimeError)])
def test_what_an_op_says_is_raised(monkeypatch, sentences, kind):
    monkeypatch.setattr(csrc, "_cuda_ops", SimpleNamespace(dy_pass=lambda: (None, *sentences)))
    with pytest.raises(kind, match=max(sentences)):
        csrc.cuda_op("dy_pass")

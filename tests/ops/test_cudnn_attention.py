"""cuDNN's attention stands in place of the library's flash attention where shapes repeat: what it is given and when.

The numbers are `bench.gpu`'s to check, on a GPU; here cuDNN is a stand-in of the same signature on the CPU's kernel.
"""

import pytest
import torch

from mmpeft_fast.ops import flash

_aten = torch.ops.aten


def _forward(q, k, v, bias, want_lse, p, causal, debug, *, scale):
    assert bias is None and want_lse and p == 0.0 and not debug
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], torch.zeros(()), torch.zeros(()), None


def _backward(dout, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, p, causal, *, scale):
    assert bias is cum_q is cum_k is None and (max_q, max_k, p) == (q.shape[2], k.shape[2], 0.0)
    assert lse.shape == (*q.shape[:3], 1)
    groups = q.shape[1] // k.shape[1]
    wide = (part.repeat_interleave(groups, 1) for part in (k, v))
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, *wide, out, lse[..., 0], 0.0, causal, scale=scale
    )
    return dq, *(part.unflatten(1, (-1, groups)).sum(2) for part in (dk, dv))


@pytest.fixture
def cudnn(monkeypatch):
    class Library:
        _scaled_dot_product_cudnn_attention = staticmethod(_forward)
        _scaled_dot_product_cudnn_attention_backward = staticmethod(_backward)

        def __getattr__(self, name):
            return getattr(_aten, name)

    monkeypatch.setattr(flash, "_aten", Library())
    monkeypatch.setattr(flash, "_kernel", lambda *args: "cudnn")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_same_attention(cudnn, monkeypatch, kv_heads):
    torch.manual_seed(0)
    q, dout = (torch.randn(2, 9, 4, 8, dtype=torch.float64).transpose(1, 2) for _ in range(2))
    k, v = (torch.randn(2, 9, kv_heads, 8, dtype=torch.float64).transpose(1, 2) for _ in range(2))
    result = flash.flash_forward(q, k, v, None, True, 0.3)
    grads = flash.flash_backward(dout, q, k, v, result, None, True, 0.3)
    monkeypatch.setattr(flash, "_kernel", lambda *args: "math")
    wanted = flash.flash_forward(q, k, v, None, True, 0.3)
    torch.testing.assert_close(result[:2], wanted[:2])
    torch.testing.assert_close(grads, flash.flash_backward(dout, q, k, v, wanted, None, True, 0.3))
    # A backward runs on the kernel of its forward, whatever would be chosen by then.
    assert result.kernel == "cudnn"
    torch.testing.assert_close(flash.flash_backward(dout, q, k, v, result, None, True, 0.3), grads)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "cudnn"),
        ({"repeat": False}, "cuda_flash"),
        ({"head_dim": 256}, "cuda_flash"),
        ({"capability": (8, 0)}, "cuda_flash"),
        ({"enabled": False}, "cuda_flash"),
        ({"deterministic": True}, "cuda_flash"),
        ({"mask": True}, "cuda_efficient"),
        ({"dtype": torch.float32}, "cuda_efficient"),
    ],
)
def test_when_it_runs(monkeypatch, change, expected):
    class OnGpu:
        """What `_kernel` looks at of a tensor."""

        def __init__(self, head_dim, dtype):
            self.shape, self.dtype, self.device = (2, 4, 9, head_dim), dtype, torch.device("cuda")

        def numel(self) -> int:
            return 1

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: change.get("capability", (9, 0)))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: change.get("enabled", True))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: change.get("deterministic", False))
    x = OnGpu(change.get("head_dim", 128), change.get("dtype", torch.bfloat16))
    mask = torch.ones(1) if change.get("mask") else None
    if change.get("repeat", True):
        with flash.repeated_shapes():
            assert flash._kernel(x, x, mask) == expected
    assert flash._kernel(x, x, mask) == expected.replace("cudnn", "cuda_flash")

"""Dropout, norms, rotary embedding and the fused loss."""

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen3VLConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from mmpeft_fast.measure import saved_bytes
from mmpeft_fast.ops import cross_entropy
from mmpeft_fast.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from mmpeft_fast.ops.dropout import draw_seed, dropout_ref, dropped, keep_probability, philox_4x32
from mmpeft_fast.ops.norms import rms_norm_ref
from mmpeft_fast.ops.rms_norm import rms_norm
from mmpeft_fast.ops.rotary import rotary_cos_sin, rotate, rotate_backward
from tests.closeness import assert_as_close_as_eager, assert_exact


@pytest.mark.parametrize(
    "counter, key, expected",
    [  # known answers of Philox4x32-10 from the Random123 distribution
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    seed = (key[1] << 32) | key[0]
    seed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    words = philox_4x32(*(torch.tensor([word]) for word in counter), seed, rounds=10)
    assert tuple(int(word) & 0xFFFFFFFF for word in words) == expected


def test_mask_is_a_function_of_seed_and_position():
    seed = torch.tensor(12345)
    whole = dropped(seed, 40, 21, 0.3)
    assert torch.equal(whole, dropped(seed, 40, 21, 0.3))
    assert torch.equal(whole[:7], dropped(seed, 7, 21, 0.3))  # rows do not depend on how many there are
    assert torch.equal(whole[:, :16], dropped(seed, 40, 16, 0.3))
    assert not torch.equal(whole, dropped(seed + 1, 40, 21, 0.3))
    assert not torch.equal(whole, dropped(seed, 40, 21, 0.3, stream=1))
    assert torch.equal(dropped(seed, 300, 4096, 0.3)[299, :21], dropped(seed, 300, 21, 0.3)[299])


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9])
def test_drop_rate_and_expectation(p):
    count = 512 * 512
    mask = dropped(torch.tensor(7), 512, 512, p)
    deviation = (p * (1 - p) / count) ** 0.5
    assert abs(mask.double().mean().item() - p) <= 5 * deviation + 2**-16
    assert abs(keep_probability(p) - (1 - p)) <= 2**-17
    rows, cols = mask.double().mean(1), mask.double().mean(0)
    assert max((rows - p).abs().max(), (cols - p).abs().max()) <= 6 * (p * (1 - p) / 512) ** 0.5 + 2**-16
    x = torch.ones(512, 512)
    kept = dropout_ref(x, torch.tensor(7), p)
    assert abs(kept.mean().item() - 1) <= 6 * (p / (1 - p) / count) ** 0.5 + 2**-16


def test_seeds_follow_torch_generator():
    torch.manual_seed(3)
    first = draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed(torch.device("cpu"))) and first.shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rms_norm(dtype):
    x = torch.randn(3, 5, 33, dtype=dtype, requires_grad=True)
    gain = torch.randn(33, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 5, 33, dtype=dtype)
    y, eager = rms_norm(x, gain, 1e-6), rms_norm_ref(x, gain, 1e-6)
    truth = rms_norm_ref(x.double(), gain.double(), 1e-6)
    grads = torch.autograd.grad(y, (x, gain), upstream)
    eager_grads = torch.autograd.grad(eager, (x, gain), upstream)
    true_grads = torch.autograd.grad(truth, (x, gain), upstream.double())
    assert_as_close_as_eager(y, eager, truth)
    for got, plain, true in zip(grads, eager_grads, true_grads, strict=True):
        assert_as_close_as_eager(got, plain, true)


def test_rms_norm_is_the_norm_of_transformers():
    norm = LlamaRMSNorm(48, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 48)
    assert_as_close_as_eager(
        rms_norm(x, norm.weight, 1e-5), norm(x), rms_norm_ref(x.double(), norm.weight.double(), 1e-5)
    )


def test_rms_norm_gradcheck_and_needs():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, 1e-6), (x, gain))
    y = rms_norm(x.detach(), gain, 1e-6)
    y.sum().backward()
    assert gain.grad is not None and x.grad is None
    with pytest.raises(ValueError, match=r"gain must be \[6\] for x \[3, 6\], got \[5\]"):
        rms_norm(x, gain[:5], 1e-6)


def test_rotation_backward_is_the_transpose():
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary_cos_sin(torch.arange(5)[None], torch.rand(4), dtype=torch.float64)
    cos, sin = cos[:, :, None], sin[:, :, None]
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(rotate(x, cos, sin), x, dy)
    assert_exact(rotate_backward(dy, cos, sin), dx)


@pytest.mark.parametrize("interleaved", [False, True])
def test_mrope_equals_transformers(interleaved):
    sections = [24, 20, 20] if interleaved else [16, 24, 24]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    text = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": rope}
    if interleaved:
        theirs = Qwen3VLTextRotaryEmbedding(Qwen3VLConfig(text_config={**text, "head_dim": 128}).text_config)
    else:
        theirs = Qwen2VLRotaryEmbedding(Qwen2VLConfig(text_config=text).text_config)
    positions = torch.randint(0, 100, (3, 2, 11))
    expected = theirs(torch.empty(1), positions)
    ours = rotary_cos_sin(positions, theirs.inv_freq, sections=sections, interleaved=interleaved)
    for got, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_rotary_errors():
    with pytest.raises(ValueError, match="three sections with sum 4, got None"):
        rotary_cos_sin(torch.zeros(3, 1, 2), torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_linear_cross_entropy(dtype, count, chunk_rows, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_CHUNK_LOGITS", chunk_rows * 33)
    x = torch.randn(9, 16, dtype=dtype, requires_grad=True)
    weight, bias = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((33, 16), (33,)))
    labels = torch.randint(0, 33, (9,))
    labels[3] = labels[8] = -100
    tensors = (x, weight, bias)
    loss = linear_cross_entropy(x, weight, labels, bias=bias, count=count)
    eager = linear_cross_entropy_ref(x, weight, labels, bias=bias, count=count)
    wide = tuple(t.detach().double().requires_grad_() for t in tensors)
    truth = linear_cross_entropy_ref(wide[0], wide[1], labels, bias=wide[2], count=count)
    assert_as_close_as_eager(loss, eager, truth)
    grads, eager_grads = (torch.autograd.grad(3 * value, tensors) for value in (loss, eager))
    for got, plain, true in zip(grads, eager_grads, torch.autograd.grad(3 * truth, wide), strict=True):
        assert_as_close_as_eager(got, plain, true)


def test_linear_cross_entropy_keeps_no_logits_and_respects_needs():
    x, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8)
    labels = torch.randint(0, 500, (64,))
    with saved_bytes() as saved:
        loss = linear_cross_entropy(x, weight, labels)
    assert saved.bytes == x.numel() * 4
    assert torch.autograd.grad(loss, x)[0].shape == x.shape
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, labels), loss)
    with pytest.raises(ValueError, match=r"labels \[S\], got x \[64, 8\], weight \[500, 8\], labels \[63\]"):
        linear_cross_entropy(x, weight, labels[1:])

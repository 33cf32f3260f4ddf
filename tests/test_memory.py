"""Activations alive after the forward pass of LLaMA-7B shapes: 4 x 700 tokens, 35 supervised a sample, fake tensors."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mmpeft_fast import add_peft, fuse, make_method, peak_bytes, provider, saved_bytes
from mmpeft_fast.models import FAMILIES, empty_model
from mmpeft_fast.ops.providers import why_not_installed
from mmpeft_fast.ops.stacking import as_rows
from tests.tiny_models import loss_and_grads, materialize_fake, randomize_trainable, tiny_batch, tiny_model

GIB = 2**30
LIMITS_GIB = {"lora": 8.5, "ia3": 8.5, "prefix": 8.5, "layernorm-simp": 8.5, "adapter": 9.5}


@pytest.mark.parametrize("method", LIMITS_GIB)
def test_activations_at_7b(method):
    model = fuse(add_peft(empty_model(FAMILIES["llava"].sizes["llava-1.5-7b"]()), make_method(method))).train()
    batch, length, supervised = 4, 700, 35
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize_fake(model)
        fuse(model)  # the weights are other tensors now: side by side again
        attention = model.model.language_model.layers[0].self_attn
        assert as_rows([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]) is not None
        embeddings = torch.empty(batch, length, 4096, dtype=torch.bfloat16)
        labels = torch.zeros(batch, length, dtype=torch.long)
        with FlopCounterMode(display=False) as flops, peak_bytes("cpu", model) as peak, saved_bytes(model) as saved:
            loss = model(inputs_embeds=embeddings, labels=labels, supervised_capacity=supervised).loss
            alive, forward_flops = peak.live, flops.get_total_flops()
            loss.backward()
        total_flops = flops.get_total_flops()
    assert alive <= LIMITS_GIB[method] * GIB
    assert saved.bytes <= alive
    # No frozen GEMM runs again: the backward costs one input gradient a GEMM, twice the bottleneck branches (their
    # own gradients), and attention's five products against the forward's two.
    allowed = 1.2 if method in ("lora", "adapter") else 1.1
    assert total_flops - forward_flops <= allowed * forward_flops


def test_saved_bytes_counts_what_autograd_holds():
    x = torch.randn(100, 10, requires_grad=True)
    weight = nn.Linear(10, 10)
    with saved_bytes(weight) as saved:
        y = weight(x).relu()
        (y * y[:50].repeat(2, 1)).sum()
    # x for dweight; relu's result, once although three ops keep it, and the product's second factor.
    assert saved.bytes == 3 * 100 * 10 * 4


def test_peak_bytes_follows_births_and_deaths():
    with peak_bytes() as peak:
        a = torch.empty(1000)
        b = torch.empty(3000)
        del b
        c = torch.empty(500)
        assert peak.live == 4 * 1500
    assert peak.bytes == 4 * 4000
    del a, c


@pytest.mark.parametrize("method", ["lora", "adapter", "ia3", "prefix", "layernorm-simp"])
def test_fused_keeps_less_than_the_eager_definition(method):
    model = add_peft(tiny_model("llava"), make_method(method)).train()
    randomize_trainable(model)
    batch = tiny_batch("llava")
    kept = {}
    for name in ("eager", "fused"):
        with saved_bytes(model) as saved:
            model(**batch)
        kept[name] = saved.bytes
        fuse(model)
    assert kept["fused"] < 0.7 * kept["eager"]
    loss_and_grads(model, batch)


@pytest.mark.parametrize("provider_name", ["torch", "cpu"])
@pytest.mark.parametrize("method", ["lora", "ia3", "layernorm-simp"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_rotation_in_place_leaves_what_the_backward_needs(family, method, provider_name):
    """q, k, v from one GEMM, q rotated in place while k and v are kept raw (IA3): equal to weights that lie apart."""
    reason = why_not_installed(provider_name)
    if reason is not None:
        pytest.skip(reason)
    # Layers that get no gradient and the sparse last one behave otherwise: what matters is the one between.
    model = add_peft(tiny_model(family, num_layers=3), make_method(method))
    randomize_trainable(model)
    fuse(model.train())
    apart = copy.deepcopy(model)  # copies of parameters have memory of their own
    results = []
    for each in (model, apart):
        torch.manual_seed(0)
        with provider(provider_name):
            results.append(loss_and_grads(each, tiny_batch(family)))
    (loss, grads), (expected, expected_grads) = results
    torch.testing.assert_close(loss, expected)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name])

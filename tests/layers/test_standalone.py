"""Layers to build models from, and their functions: their definitions, HF PEFT's layers, every gradient."""

import copy

import pytest
import torch
from torch import nn

from mmpeft_fast import functional, fuse
from mmpeft_fast.layers import AdapterLinear, IA3Linear, LoRALinear, PrefixAttention, RMSNorm
from mmpeft_fast.layers.peft_linear import PeftLinear
from mmpeft_fast.ops.attention import attention_ref
from tests.closeness import assert_as_close_as_eager
from tests.tiny_models import loss_and_grads, randomize_trainable, tiny_batch, tiny_model

LINEARS = {
    "lora": (LoRALinear, {"r": 5, "alpha": 3.0}),
    "rank-stabilised": (LoRALinear, {"r": 16, "alpha": 4.0, "rank_stabilized": True}),
    "ia3": (IA3Linear, {}),
    "ia3 on the input": (IA3Linear, {"where": "input"}),
    "adapter behind": (AdapterLinear, {"bottleneck": 7}),
    "adapter before": (AdapterLinear, {"bottleneck": 7, "position": "pre", "activation": "gelu", "scaling": 0.5}),
    "adapter beside": (AdapterLinear, {"bottleneck": 7, "position": "parallel", "activation": "relu"}),
}


def outputs_and_grads(function, module, inputs):
    """Output, gradient of every trained parameter and of every input, for a loss that weighs all elements apart."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    module.zero_grad()
    y = function(module, *inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {"y": y.detach(), **grads, **{f"x{i}": x.grad for i, x in enumerate(inputs)}}


def assert_is_its_definition(module, fused, eager, inputs):
    wide = copy.deepcopy(module).double()
    truth = outputs_and_grads(eager, wide, [x.double() for x in inputs])
    expected, got = outputs_and_grads(eager, module, inputs), outputs_and_grads(fused, module, inputs)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        assert_as_close_as_eager(value, expected[name], truth[name], name)


def off_their_initial_values(module):
    randomize_trainable(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 33), (1, 1, 33), (2, 65, 33)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", LINEARS)
def test_linears(name, bias, shape, dtype):
    kind, settings = LINEARS[name]
    torch.manual_seed(0)
    module = off_their_initial_values(kind(33, 130, bias=bias, dtype=dtype, **settings))
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 130, dtype=dtype)
    assert_is_its_definition(module, lambda m, x: m(x), lambda m, x: PeftLinear.forward(m, x), [x])
    assert_is_its_definition(
        module, lambda m, x, r: m(x, residual=r), lambda m, x, r: PeftLinear.forward(m, x) + r, [x, residual]
    )


@pytest.mark.parametrize("name", LINEARS)
def test_frozen_and_trained_and_at_the_start(name):
    kind, settings = LINEARS[name]
    linear = nn.Linear(12, 20)
    weight, state = linear.weight, {key: value.clone() for key, value in linear.state_dict().items()}
    module = kind.from_linear(linear, **settings)
    assert module.weight is weight and not weight.requires_grad and not module.bias.requires_grad
    trained = {key for key, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained and trained.isdisjoint(state)
    assert all(parameter.dtype == torch.float32 and not parameter.is_meta for parameter in module.parameters())
    assert all(torch.equal(module.state_dict()[key], value) for key, value in state.items())
    x = torch.randn(4, 12)
    if kind is not AdapterLinear:  # whose published initialisation is not the identity
        torch.testing.assert_close(module(x), linear(x))
    twin = kind(12, 20, **settings)
    twin.load_state_dict(off_their_initial_values(module).state_dict())
    assert torch.equal(twin(x), module(x))
    assert not module.to(torch.bfloat16)(x.bfloat16()).isnan().any()


def test_lora_is_pefts():
    from peft import LoraConfig
    from peft.tuners.lora import Linear as TheirLinear

    torch.manual_seed(0)
    base = nn.Linear(24, 40)
    theirs = TheirLinear(base, "default", r=6, lora_alpha=9, config=LoraConfig(r=6, lora_alpha=9))
    nn.init.normal_(theirs.lora_B["default"].weight)
    ours = LoRALinear.from_linear(base, r=6, alpha=9)
    with torch.no_grad():
        ours.branches[0].down.copy_(theirs.lora_A["default"].weight)
        ours.branches[0].up.copy_(theirs.lora_B["default"].weight)
    x = torch.randn(5, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_dropout_only_in_training_and_the_same_mask_backward():
    torch.manual_seed(0)
    layer = off_their_initial_values(LoRALinear(64, 8, r=4, dropout=0.5, bias=False))
    x = torch.randn(16, 64)
    assert torch.equal(layer.eval()(x), layer(x)) and not torch.equal(layer.train()(x), layer(x))
    seed = torch.tensor(3)
    with torch.no_grad():
        layer.weight.zero_()
    branch = layer.branches[0]
    options = {"scaling": branch.placement.scaling, "dropout": 0.5, "seed": seed}
    y = functional.lora_linear(x, layer.weight, branch.down, branch.up, **options)
    assert torch.equal(y, functional.lora_linear(x, layer.weight, branch.down, branch.up, **options))
    # Linear in x for a fixed mask: the directional derivative of the backward is the forward itself.
    direction = torch.randn_like(x)
    x.requires_grad_()
    functional.lora_linear(x, layer.weight, branch.down, branch.up, **options).sum().backward()
    moved = functional.lora_linear(direction, layer.weight, branch.down, branch.up, **options).sum()
    torch.testing.assert_close((x.grad * direction).sum(), moved)


def test_functions_are_the_modules():
    torch.manual_seed(0)
    x, residual = torch.randn(6, 12), torch.randn(6, 20)
    lora = off_their_initial_values(LoRALinear(12, 20, r=4))
    branch = lora.branches[0]
    y = functional.lora_linear(
        x, lora.weight, branch.down, branch.up, scaling=branch.placement.scaling, bias=lora.bias, residual=residual
    )
    assert torch.equal(y, lora(x, residual=residual))
    for where in ("input", "output"):
        ia3 = off_their_initial_values(IA3Linear(12, 20, where=where))
        scale = ia3.in_scale if where == "input" else ia3.out_scale
        assert torch.equal(functional.ia3_linear(x, ia3.weight, scale, where=where, bias=ia3.bias), ia3(x))
    for position in ("pre", "parallel", "post"):
        adapter = off_their_initial_values(AdapterLinear(12, 20, bottleneck=5, position=position))
        down, up = adapter.branches[0].down, adapter.branches[0].up
        y = functional.adapter_linear(x, adapter.weight, down, up, position=position, bias=adapter.bias)
        assert torch.equal(y, adapter(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 130)])
def test_rms_norm(shape, dtype):
    norm = off_their_initial_values(RMSNorm(shape[-1], 1e-5, dtype=dtype))
    assert norm.weight.dtype == torch.float32

    def definition(module, x):
        wide = x if x.dtype == torch.float64 else x.float()
        h = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + module.eps)
        return (h * module.weight).to(x.dtype)

    assert_is_its_definition(norm, lambda m, x: m(x), definition, [torch.randn(shape, dtype=dtype)])


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_prefix_attention(num_kv_heads, is_masked):
    torch.manual_seed(0)
    module = off_their_initial_values(PrefixAttention(4, 16, num_virtual_tokens=3, num_kv_heads=num_kv_heads))
    q, k, v = torch.randn(2, 9, 64), *torch.randn(2, 2, 9, 16 * num_kv_heads)
    mask = None
    if is_masked:
        mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9).clone()
        mask[1, :, :, :4] = False  # the first queries of the second row see the prefix alone
    angles = functional.rotary_cos_sin(
        torch.arange(3, 12)[None], 100.0 ** -torch.linspace(0, 1, 8), dtype=torch.float64
    )

    def run(function):
        def call(module, q, k, v):
            cos, sin = (part.to(q.dtype) for part in angles)
            return function(module, q, k, v, cos, sin)

        return call

    def definition(module, q, k, v, cos, sin):
        prefix = (module.prefix_k, module.prefix_v)
        return attention_ref(q, k, v, cos, sin, head_dim=16, mask=mask, prefix=prefix)

    assert_is_its_definition(module, run(lambda m, *args: m(*args, mask=mask)), run(definition), [q, k, v])
    cos, sin = (part.float() for part in angles)
    by_function = functional.prefix_attention(q, k, v, cos, sin, module.prefix_k, module.prefix_v, mask=mask)
    assert torch.equal(by_function, module(q, k, v, cos, sin, mask=mask))


def test_models_built_from_them_can_be_fused():
    model = tiny_model("llava").requires_grad_(False)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj = LoRALinear.from_linear(layer.self_attn.q_proj, r=4)
        layer.mlp.down_proj = IA3Linear.from_linear(layer.mlp.down_proj, where="input")
    randomize_trainable(model.train())
    loss, grads = loss_and_grads(model, tiny_batch("llava"))
    fused_loss, fused_grads = loss_and_grads(fuse(model, strict=True), tiny_batch("llava"))
    torch.testing.assert_close(fused_loss, loss)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoRALinear(4, 4, r=0), "LoRALinear: expected r >= 1, got 0"),
        (lambda: LoRALinear(4, 4, dropout=1.0), r"LoRALinear: expected dropout in \[0, 1\), got 1.0"),
        (lambda: IA3Linear(4, 4, where="middle"), r"expected where in \['input', 'output'\], got 'middle'"),
        (lambda: AdapterLinear(4, 4, activation="swish"), r"expected activation in \['gelu', .*\], got 'swish'"),
        (lambda: AdapterLinear(4, 4, position="left"), r"expected position in \['parallel', .*\], got 'left'"),
        (lambda: PrefixAttention(4, 8, num_virtual_tokens=2, num_kv_heads=3), "num_kv_heads to divide 4 heads, got 3"),
        (lambda: LoRALinear.from_linear(nn.Bilinear(2, 2, 2)), "expected a plain torch.nn.Linear, got Bilinear"),
        (lambda: LoRALinear(4, 4)(torch.ones(2, 5)), r"expected weight \[N, 5\] in segment 0, got \[4, 4\]"),
        (lambda: functional.ia3_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(4), where="x"), "where in"),
    ],
)
def test_errors_say_what_was_expected(make, message):
    with pytest.raises(ValueError, match=message):
        make()

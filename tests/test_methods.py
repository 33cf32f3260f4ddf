"""Settings of the methods: what they place where, and what they refuse."""

import copy

import pytest
import torch

from mmpeft_fast import (
    IA3,
    METHODS,
    Adapter,
    LayerNorm,
    LoRA,
    MSPLoRA,
    Prefix,
    ShareLoRA,
    add_peft,
    fuse,
    make_method,
    unfuse,
)
from mmpeft_fast.layers.peft_linear import Bottleneck, PeftLinear
from mmpeft_fast.placement import ATTENTION_ROLES, BranchPlacement
from tests.closeness import assert_as_close_as_eager
from tests.tiny_models import loss_and_grads, tiny_batch, tiny_model


def test_study_defaults():
    lora = LoRA().place().branches
    assert set(lora) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert lora["q"] == BranchPlacement(position="parallel", rank=128, scaling=2.0, dropout=0.05)
    adapter = Adapter().place().branches
    assert {role: branch.position for role, branch in adapter.items()} == {"gate": "pre", "up": "pre", "down": "post"}
    assert adapter["up"].activation == "tanh" and adapter["up"].rank == 256 and adapter["up"].init == "bert"
    assert IA3().place().scales == {"k": "output", "v": "output", "down": "input"}
    assert Prefix().place().prefix.num_virtual_tokens == 20
    assert make_method("layernorm") == LayerNorm(connector=True, embeddings=True, head=True)


def test_locations():
    assert tuple(LoRA(targets="attention").place().branches) == ATTENTION_ROLES
    assert {r: b.position for r, b in Adapter(targets="attention").place().branches.items()} == {
        "q": "pre", "k": "pre", "v": "pre", "o": "post",
    }  # fmt: skip
    assert {b.position for b in Adapter(placement="parallel", targets="both").place().branches.values()} == {"parallel"}
    assert IA3(targets="attention").place().scales == {"k": "output", "v": "output"}
    assert IA3(targets="mlp").place().scales == {"down": "input"}
    assert LoRA(r=4, alpha=8, rank_stabilized=True).scaling == 4.0
    streams = [branch.stream for branch in LoRA(independent_masks=True).place().branches.values()]
    assert len(set(streams)) == 7


def test_what_layers_share():
    """MSPLoRA's parts have a scaling each: 16 / 64, 16 / 32, 16 / 16."""
    parts = MSPLoRA().place().branches["q"]
    assert [(part.rank, part.scaling, part.down_layers, part.up_layers) for part in parts] == [
        (64, 0.25, 0, 0), (32, 0.5, 8, 8), (16, 1.0, 1, 1)
    ]  # fmt: skip
    for shared, layers in (("down", (0, 1)), ("up", (1, 0)), ("both", (0, 0))):
        branch = ShareLoRA(shared=shared).place().branches["v"]
        assert (branch.down_layers, branch.up_layers) == layers and branch.scaling == 0.25
    model = add_peft(tiny_model("llama", num_layers=3), MSPLoRA(r=4, group_layers=2, targets=("q",)))
    first, second, third = (layer.self_attn.q_proj.branches for layer in model.model.layers)
    assert first[0].down is third[0].down and first[0].up is second[0].up
    assert first[1].up is second[1].up and second[1].up is not third[1].up
    assert first[2].down is not second[2].down


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("lora", {"r": 0}, "LoRA.r: expected an integer of 1 to 65536, got 0"),
        ("lora", {"r": 2.5}, "LoRA.r: expected an integer of 1 to 65536, got 2.5"),
        ("lora", {"r": 99999999999}, "LoRA.r: expected an integer .* got 99999999999"),
        ("lora", {"r": True}, "LoRA.r: expected an integer .* got True"),
        ("lora", {"alpha": float("inf")}, "LoRA.alpha: expected a number of at least 0, got inf"),
        ("lora", {"alpha": 10**400}, "LoRA.alpha: expected a number of at least 0, got 1000"),
        ("lora", {"alpha": "8"}, "LoRA.alpha: expected a number of at least 0, got '8'"),
        ("lora", {"rank_stabilized": "no"}, "LoRA.rank_stabilized: expected true or false, got 'no'"),
        ("lora", {"independent_masks": 1}, "LoRA.independent_masks: expected true or false, got 1"),
        ("layernorm", {"final": "yes"}, "LayerNorm.final: expected true or false, got 'yes'"),
        ("prefix", {"projection": None}, "Prefix.projection: expected true or false, got None"),
        ("lora", {"targets": 1}, "LoRA.targets: expected a text or a list of texts, got 1"),
        ("ia3", {"targets": None}, "IA3.targets: expected a text or a list of texts, got None"),
        ("adapter", {"targets": ("q", 1)}, "Adapter.targets: expected a text or a list of texts, got"),
        ("lora", {"dropout": 1}, r"LoRA.dropout: expected a number of at least 0 and below 1 - 2\^-17, got 1"),
        ("lora", {"dropout": float("nan")}, "LoRA.dropout: expected"),
        ("lora", {"targets": "everything"}, "expected targets in .*'attention', 'both', 'mlp'.* got 'everything'"),
        ("lora", {"targets": ("q", "w")}, r"unknown roles \['w'\]; expected roles in \['q', 'k'"),
        ("lora", {"targets": ("q", "q")}, "at least one role and none twice"),
        ("lora", {"targets": ()}, "at least one role"),
        ("lora", {"rank": 8}, r"method 'lora' has no setting \['rank'\]; expected settings in \['r', 'alpha'"),
        ("adapter", {"activation": "selu"}, "Adapter.activation: expected one of .* got 'selu'"),
        ("adapter", {"init": "zeros"}, "Adapter.init: expected one of .* got 'zeros'"),
        ("prefix", {"num_virtual_tokens": 0}, "Prefix.num_virtual_tokens: expected an integer of 1 to 65536, got 0"),
        ("lora2", {}, "unknown method 'lora2'; expected one of .*'lora'"),
        ("sharelora", {"shared": "all"}, "ShareLoRA.shared: expected one of .* got 'all'"),
        ("msplora", {"r": 6}, "MSPLoRA.r: expected an integer of 1 to 65536 and divisible by 4, got 6"),
        ("msplora", {"targets": ("w",)}, r"MSPLoRA: unknown roles \['w'\]"),
    ],
)
def test_refused_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, **settings)


@pytest.mark.parametrize("init", ["bert", "kaiming"])
def test_initialisation(init):
    torch.manual_seed(0)
    branch = Bottleneck(
        512, 256, BranchPlacement(position="parallel", rank=64, init=init), dtype=torch.float32, device="cpu"
    )
    bound = {"bert": 0.02, "kaiming": (1 / 512) ** 0.5 / 3**0.5}[init]  # standard deviations
    deviation = branch.down.std().item()
    assert abs(deviation - bound) < 0.05 * bound
    assert (branch.up == 0).all() if init == "kaiming" else abs(branch.up.std().item() - 0.02) < 0.001


@pytest.mark.parametrize("name", METHODS)
def test_only_the_method_is_trained(name):
    model = add_peft(tiny_model("qwen2_vl"), make_method(name))
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    marks = {
        "lora": ("branches",), "adapter": ("branches",), "ia3": ("_scale",), "prefix": ("prefix_encoder",),
        "layernorm-simp": ("layernorm",), "layernorm": ("layernorm", "merger", "embed_tokens", "lm_head"),
        "dora": ("branches", "magnitude"), "lora-fa": (".up",), "vera": (".inner", ".outer"),
        "moelora": ("branches", "task_embedding"),
    }.get(name, ("branches",))  # fmt: skip
    assert trained and all(any(mark in n for mark in marks) for n in trained)
    assert all(any(mark in n for n in trained) for mark in marks)


def test_wide_parameters_over_a_half_precision_base():
    model = add_peft(tiny_model("llava", dtype=torch.bfloat16), LoRA(r=2))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("fused", [False, True])
def test_gains_of_a_bf16_model_move(fused):
    model = add_peft(tiny_model("qwen2_vl", dtype=torch.bfloat16), LayerNorm(final=True)).train()
    gains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {gain.dtype for gain in gains} == {torch.float32} and len(gains) == 5
    before = [gain.clone() for gain in gains]
    optimizer = torch.optim.AdamW(gains, lr=2e-4, weight_decay=0.0)
    batch = tiny_batch("qwen2_vl", dtype=torch.bfloat16)
    loss = (fuse(model) if fused else model)(**batch).loss
    loss.backward()
    optimizer.step()
    for gain, old in zip(gains, before, strict=True):
        moved = (gain - old).abs()
        assert (moved > 0).float().mean() > 0.9 and moved.max() < 2**-8  # far below what bfloat16 can resolve at 1


def test_wide_gains_fused_and_eager():
    model = add_peft(tiny_model("llava", dtype=torch.bfloat16), LayerNorm(final=True)).train()
    batch = tiny_batch("llava", dtype=torch.bfloat16)
    wide = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    truth = loss_and_grads(copy.deepcopy(model).double(), wide)
    eager = loss_and_grads(model, batch)
    fused = loss_and_grads(fuse(model), batch)
    for name, grad in eager[1].items():
        assert_as_close_as_eager(fused[1][name].bfloat16(), grad.bfloat16(), truth[1][name], name)
    restored = loss_and_grads(unfuse(model), batch)
    assert torch.equal(restored[0], eager[0])


def test_lora_starts_as_the_base_and_names_of_the_base_stay():
    model = tiny_model("llava")
    names = set(model.state_dict())
    linear = model.model.language_model.layers[0].mlp.up_proj
    x = torch.randn(3, 256)
    before = linear(x)
    add_peft(model, LoRA(r=2, dropout=0.0))
    assert isinstance(linear, PeftLinear) and torch.equal(linear(x), before)
    assert names < set(model.state_dict())

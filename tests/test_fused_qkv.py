"""What a fused q, k, v projection asks of the layers, free of any family: columns of one buffer, paths, locations."""

import pytest
import torch
from torch import nn

from mmpeft_fast import IA3, Adapter, LoRA
from mmpeft_fast.layers.decoder_paths import DecoderPaths
from mmpeft_fast.layers.split_columns import split_columns
from mmpeft_fast.ops import stacking

FUSED_ROLES = ("qkv", "o", "gate", "up", "down")


def test_columns_are_views_and_so_is_their_gradient():
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    parts = split_columns(x, 3)
    assert [part.data_ptr() - x.data_ptr() for part in parts] == [0, 32, 64]
    assert all(torch.equal(part, expected) for part, expected in zip(parts, x.chunk(3, dim=-1), strict=True))
    grads = stacking.empty_columns(parts)
    for i, grad in enumerate(grads):
        grad.fill_(i)
    (dx,) = torch.autograd.grad(parts, x, grads)
    assert dx.data_ptr() == grads[0].data_ptr() and dx.shape == x.shape
    assert dx[0, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


def test_split_columns_with_gradients_that_lie_apart():
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: [part * (i + 1) for i, part in enumerate(split_columns(x, 3))], x)
    q, _, v = split_columns(x, 3)
    (dx,) = torch.autograd.grad((q.sum() + (2 * v).sum()), x)
    assert torch.equal(dx, torch.tensor([1.0, 1, 0, 0, 2, 2]).double().expand(3, 6))
    with pytest.raises(ValueError, match=r"expected a multiple of 4 columns, got \[3, 6\]"):
        split_columns(x, 4)


def test_paths():
    separate, fused = DecoderPaths(), DecoderPaths(roles={"qkv": "attn.c_attn"}, layers="h", attention="attn")
    assert separate.projections == ("q", "k", "v") and fused.projections == ("qkv",)
    layer = nn.Module()
    layer.attn = nn.Module()
    layer.attn.c_attn = nn.Linear(2, 6)
    decoder = nn.Module()
    decoder.h = nn.ModuleList([layer])
    assert fused.layers_of(decoder) == [layer] and fused.attention_of(layer) is layer.attn
    assert fused.at(layer, "qkv") is layer.attn.c_attn


def test_locations_mean_the_roles_that_a_layer_has():
    assert tuple(LoRA(targets="attention").place(FUSED_ROLES).branches) == ("o", "qkv")
    assert set(LoRA().place(FUSED_ROLES).branches) == set(FUSED_ROLES)
    positions = {role: b.position for role, b in Adapter(targets="both").place(FUSED_ROLES).branches.items()}
    assert positions == {"o": "post", "gate": "pre", "up": "pre", "down": "post", "qkv": "pre"}
    assert IA3(targets="mlp").place(FUSED_ROLES).scales == {"down": "input"}
    with pytest.raises(ValueError, match="IA3: expected at least one role"):
        IA3(targets="attention").place(FUSED_ROLES)  # k and v cannot be told apart there
    assert LoRA(targets=("q", "qkv")).place(FUSED_ROLES).branches.keys() == {"q", "qkv"}  # refused where they meet

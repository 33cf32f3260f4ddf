"""The prefix part of attention of the C++ provider against the torch provider, with truth in float64."""

import pytest
import torch

from mmpeft_fast.ops import kernels_cpu, kernels_torch
from tests.csrc.arrays import assert_same_set, contiguous, strided


def make(batch, heads, kv_heads, length, num_prefix, head_dim, dtype):
    def laid_out_by_token():
        return strided(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)

    prefix = tuple(strided(kv_heads, num_prefix, head_dim, dtype=torch.float32) for _ in range(2))
    lse = torch.randn(batch, heads, length)
    return laid_out_by_token, prefix, lse


@pytest.mark.parametrize(
    "batch, heads, kv_heads, length, num_prefix, head_dim",
    [
        (1, 1, 1, 1, 1, 7), (2, 4, 2, 5, 20, 64), (2, 2, 2, 33, 3, 33), (1, 6, 1, 9, 33, 130), (0, 2, 1, 4, 3, 8),
        (2, 6, 2, 35, 9, 40), (3, 4, 2, 1, 17, 33), (1, 2, 1, 150, 6, 16),
        (2, 10, 10, 135, 5, 8), (1, 18, 9, 290, 2, 7),
    ],
)  # fmt: skip
def test_forward_and_backward(batch, heads, kv_heads, length, num_prefix, head_dim, dtype, instruction_set):
    laid_out, prefix, lse = make(batch, heads, kv_heads, length, num_prefix, head_dim, dtype)
    q, out = laid_out(), laid_out()
    options = {"scale": head_dim**-0.5, "alive": None}
    merged, merged_lse = assert_same_set(
        kernels_cpu.merge_prefix, kernels_torch.merge_prefix, (q, *prefix, out, lse), options, "forward"
    )
    arguments = (laid_out(), q, *prefix, merged, merged_lse, laid_out())
    assert_same_set(
        kernels_cpu.prefix_backward, kernels_torch.prefix_backward, arguments, {"scale": head_dim**-0.5}, "backward"
    )


@pytest.mark.parametrize("per_batch", [False, True])
def test_queries_whose_main_part_is_dead(per_batch, dtype):
    laid_out, prefix, lse = make(2, 4, 2, 6, 5, 16, dtype)
    q, out = laid_out(), laid_out()
    alive = torch.rand(2 if per_batch else 1, 1, 6) < 0.5
    alive[..., 0] = False
    dead = ~alive.expand(2, 4, 6)
    lse[dead] = 123.0
    clean = out.masked_fill(dead[..., None], 0.0)
    options = {"scale": 0.25, "alive": alive}
    merged, _ = assert_same_set(
        kernels_cpu.merge_prefix, kernels_torch.merge_prefix, (q, *prefix, clean, lse), options, "clean"
    )
    # A kernel may report nan where nothing is attended to.
    hostile = out.masked_fill(dead[..., None], float("nan")).masked_fill(~dead[..., None], 0.0)
    hostile = hostile + clean.masked_fill(dead[..., None], 0.0)
    again, _ = kernels_cpu.merge_prefix(
        q, *prefix, hostile, lse.masked_fill(dead, float("nan")), scale=0.25, alive=alive
    )
    assert torch.equal(again, merged)


def test_a_padded_lse_keeps_its_padding():
    laid_out, prefix, lse = make(1, 2, 1, 5, 3, 8, torch.float32)
    q, out = laid_out(), laid_out()
    padded = torch.cat((lse, torch.full((1, 2, 3), 7.0)), dim=-1)
    merged, merged_lse = kernels_cpu.merge_prefix(q, *prefix, out.clone(), padded.clone(), scale=1.0, alive=None)
    _, plain_lse = kernels_cpu.merge_prefix(q, *prefix, out.clone(), lse.clone(), scale=1.0, alive=None)
    assert torch.equal(merged_lse[..., :5], plain_lse) and (merged_lse[..., 5:] == 7).all()
    dq = contiguous(1, 2, 5, 8, dtype=torch.float32)
    results = [
        kernels_cpu.prefix_backward(out, q, *prefix, merged, each, dq.clone(), scale=1.0)
        for each in (merged_lse, plain_lse)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("num_prefix", [1, 2, 3, 7, 8, 9, 15, 16, 23])
def test_every_group_of_tokens(num_prefix, instruction_set):
    """Tokens of weight 0 among the others show where one is left out or taken twice."""
    laid_out, _, _ = make(1, 2, 1, 18, num_prefix, 16, torch.float32)
    q, out, lse = torch.ones_like(laid_out()), torch.zeros_like(laid_out()), torch.full((1, 2, 18), float("-inf"))
    for p in range(num_prefix):
        prefix_k, prefix_v = torch.full((1, num_prefix, 16), -100.0), torch.randn(1, num_prefix, 16)
        prefix_k[:, p] = 100.0
        merged, merged_lse = kernels_cpu.merge_prefix(
            q, prefix_k, prefix_v, out.clone(), lse.clone(), scale=0.5, alive=None
        )
        assert torch.equal(merged, prefix_v[:, None, p : p + 1].expand_as(merged)) and (merged_lse == 800).all()
        dq = torch.zeros_like(out)
        _, _, dprefix_v = kernels_cpu.prefix_backward(q, q, prefix_k, prefix_v, merged, merged_lse, dq, scale=0.5)
        expected = torch.zeros(1, num_prefix, 16)
        expected[:, p] = 36.0
        assert torch.equal(dprefix_v, expected)

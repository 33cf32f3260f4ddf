"""Scale, head norm and rotation of the heads of q, k and v, forward and every gradient."""

import pytest
import torch
from mmpeft_kernels.rotary import Heads, rotary, rotary_backward
from mmpeft_kernels.tile import Tile

from mmpeft_fast.ops.norms import rms_norm_ref
from mmpeft_fast.ops.rotary import rotary_cos_sin, rotate
from tests.closeness import assert_as_close_as_eager

TILE = Tile(block_m=16, block_n=2)
EPS = 1e-3


def reference(part, cos, sin, head_dim):
    heads = part.x if part.scale is None else part.x * part.scale
    heads = heads.unflatten(-1, (-1, head_dim))
    if part.gain is not None:
        heads = rms_norm_ref(heads, part.gain, EPS)
    if part.rotated:
        heads = rotate(heads, cos[:, :, None], sin[:, :, None])
    return heads.flatten(2)


def gradients(part, dy, cos, sin, head_dim, cast):
    """y, dx, and dscale and dgain where there is such a parameter, by autograd."""
    tensors = {name: cast(leaf).requires_grad_() for name, leaf in part._asdict().items() if torch.is_tensor(leaf)}
    y = reference(part._replace(**tensors), cast(cos), cast(sin), head_dim)
    grads = torch.autograd.grad(y, tuple(tensors.values()), cast(dy))
    return {"y": y} | {f"d{name}": grad for name, grad in zip(tensors, grads)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "batch, length, head_dim, shared_angles, parts",
    [
        (1, 1, 8, True, {"q": (2, "rotated")}),
        (2, 17, 12, True, {"q": (5, "rotated"), "k": (1, "rotated scale"), "v": (1, "scale")}),
        (2, 17, 12, False, {"q": (4, "rotated gain"), "k": (2, "rotated gain")}),
        (3, 7, 16, False, {"q": (3, "rotated scale gain"), "v": (1, "")}),
        (1, 33, 8, True, {"q": (3, "rotated"), "k": (1, "rotated scale gain"), "v": (3, "scale")}),
        (1, 5, 8, None, {"v": (3, "scale")}),
    ],
)
def test_columns_of_stacked_buffers(dtype, batch, length, head_dim, shared_angles, parts):
    torch.manual_seed(0)
    widths = [num_heads * head_dim for num_heads, _ in parts.values()]

    def buffers():
        """Parts side by side, the last column belonging to none."""
        return torch.randn(batch, length, sum(widths) + 1).to(dtype).split([*widths, 1], dim=2)

    stacked, dys = buffers(), buffers()[: len(parts)]
    heads = [
        Heads(
            x=x,
            scale=torch.randn(width).to(dtype) if "scale" in how else None,
            gain=torch.randn(head_dim).to(dtype) if "gain" in how else None,
            rotated="rotated" in how,
        )
        for x, width, (_, how) in zip(stacked, widths, parts.values())
    ]
    # mRoPE: three positions a token.
    positions = torch.randint(0, 50, (3, 1 if shared_angles else batch, length))
    sections = [head_dim // 2 - 2, 1, 1]
    cos, sin = (part.to(dtype) for part in rotary_cos_sin(positions, torch.rand(head_dim // 2), sections=sections))
    angles = (None, None) if shared_angles is None else (cos, sin)
    out_buffer, dx_buffer = buffers(), buffers()
    outs, dxs = out_buffer[: len(parts)], dx_buffer[: len(parts)]
    spare = out_buffer[-1].clone(), dx_buffer[-1].clone()
    options = {"head_dim": head_dim, "eps": EPS, "tile": TILE}
    returned = rotary(heads, *angles, outs=outs, **options)
    assert all(one is two for one, two in zip(returned, outs))
    grads = rotary_backward(
        dys, heads, *angles, need_dscale=[True] * 3, need_dgain=[True] * 3, outs=dxs, **options
    )  # fmt: skip
    for part, dy, y, dx, got in zip(heads, dys, outs, dxs, grads):
        eager = gradients(part, dy, cos, sin, head_dim, torch.clone)
        truth = gradients(part, dy, cos, sin, head_dim, torch.Tensor.double)
        assert got.dx is dx
        got = {"y": y} | {name: grad for name, grad in got._asdict().items() if grad is not None}
        assert got.keys() == truth.keys()
        for name, true in truth.items():
            assert got[name].dtype == dtype
            assert_as_close_as_eager(got[name], eager[name], true, name)
    assert torch.equal(out_buffer[-1], spare[0]) and torch.equal(dx_buffer[-1], spare[1])
    again = rotary_backward(dys, heads, *angles, need_dscale=[True] * 3, need_dgain=[True] * 3, **options)
    for one, two in zip(grads, again):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(one, two))


def test_in_place_needs_dtypes_and_no_rows():
    x, scale, gain = torch.randn(5, 24), torch.randn(24), torch.randn(8)
    cos, sin = (part[0] for part in rotary_cos_sin(torch.arange(5)[None], torch.rand(4)))
    part = Heads(x, scale, gain)
    (expected,) = rotary([part], cos, sin, head_dim=8)
    kept = x.clone()
    assert rotary([part], cos, sin, head_dim=8, outs=[x])[0] is x and torch.equal(x, expected)
    grads = rotary_backward([expected], [part._replace(x=kept)], cos, sin, head_dim=8)
    assert grads[0].dscale is None and grads[0].dgain is None
    (alone,) = rotary_backward([expected], [Heads(None, scale)], cos, sin, head_dim=8)
    (in_place,) = rotary_backward([expected], [Heads(None, scale)], cos, sin, head_dim=8, outs=[expected])
    assert in_place.dx is expected and torch.equal(alone.dx, expected)
    mixed = Heads(kept.half(), scale, gain.half())
    (grads,) = rotary_backward(
        [kept.half()], [mixed], cos, sin, head_dim=8, need_dscale=[True], need_dgain=[True]
    )  # fmt: skip
    assert grads.dx.dtype == grads.dgain.dtype == torch.float16 and grads.dscale.dtype == torch.float32
    (empty,) = rotary([Heads(x[:0])], cos, sin, head_dim=8)
    assert empty.shape == (0, 24)
    (grads,) = rotary_backward([empty], [Heads(empty, scale)], cos, sin, head_dim=8, need_dscale=[True])
    assert torch.equal(grads.dscale, torch.zeros(24))


def test_errors():
    x, cos = torch.randn(4, 24), torch.randn(4, 8)
    with pytest.raises(ValueError, match="rotary: expected 1 to 3 parts, got 4 for 4"):
        rotary([Heads(x)] * 4, cos, cos, head_dim=8)
    with pytest.raises(ValueError, match=r"as many rows and whole heads of 8, got \[\(4, 24\), \(3, 24\)\]"):
        rotary([Heads(x), Heads(x[:3])], cos, cos, head_dim=8)
    with pytest.raises(ValueError, match=r"as many rows and whole heads of 16, got \[\(4, 24\)\]"):
        rotary([Heads(x)], cos, cos, head_dim=16)
    with pytest.raises(ValueError, match="expected cos and sin for parts that are rotated, got None"):
        rotary([Heads(x)], None, None, head_dim=8)
    with pytest.raises(ValueError, match="expected x of every part with a gain or a trained scale, got None"):
        rotary_backward([x], [Heads(None, gain=torch.ones(8))], cos, cos, head_dim=8)

"""The fused linear against its definition: every combination in float64, hostile shapes in the dtypes of training."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpeft_fast.measure import saved_bytes
from mmpeft_fast.ops.activations import ACTIVATIONS
from mmpeft_fast.ops.fused_linear import fused_linear, fused_linear_ref
from mmpeft_fast.ops.prologue import PROLOGUES
from mmpeft_fast.ops.segments import Branch, Segment
from tests.closeness import assert_as_close_as_eager, assert_exact
from tests.ops.calls import as_tuple, make_call

PLACEMENTS = [(), ("parallel",), ("pre",), ("post",), ("parallel", "pre", "post"), ("parallel", "parallel")]
EPILOGUES = [
    {},
    {"bias": True},
    {"out_scale": True},
    {"residual": True},
    {"bias": True, "out_scale": True, "in_scale": True, "residual": True},
]


def run(call, function, *, upstream=None):
    """Outputs, upstream gradients and gradients by name of every tensor that requires grad."""
    arguments = call.arguments()
    outputs = as_tuple(function(*arguments, **call.options))
    if upstream is None:
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y.dtype) for y in outputs]
    wanted = {name: tensor for name, tensor in call.named_tensors().items() if tensor.requires_grad}
    grads = torch.autograd.grad(outputs, list(wanted.values()), upstream)
    return outputs, upstream, dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("positions", PLACEMENTS, ids=lambda p: "+".join(p) or "plain")
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=lambda e: "+".join(e) or "bare")
def test_gradcheck(prologue, positions, epilogue):
    call = make_call(prologue=prologue, positions=positions, activation="tanh", **epilogue)
    tensors = call.named_tensors()

    def function(*values):
        replacement = dict(zip(map(id, tensors.values()), values, strict=True))
        moved = call.map(lambda tensor: replacement[id(tensor)])
        return fused_linear(*moved.arguments(), **moved.options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("num_segments", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_definition_in_float64(num_segments, dropout, activation):
    for prologue, positions in itertools.product(PROLOGUES, PLACEMENTS):
        call = make_call(
            prologue=prologue, positions=positions, activation=activation, num_segments=num_segments, dropout=dropout,
            bias=True, out_scale=True, in_scale=True, residual=num_segments == 1,
        )  # fmt: skip
        outputs, upstream, grads = run(call, fused_linear)
        truth, _, true_grads = run(call, fused_linear_ref, upstream=upstream)
        for actual, expected in zip(outputs, truth, strict=True):
            assert_exact(actual, expected, f"{prologue} {positions}")
        for name, grad in grads.items():
            assert_exact(grad, true_grads[name], f"{prologue} {positions} d{name}")


@pytest.mark.parametrize("gate", [(2, 2, 2), (2, 1, 4), (1, 2, 1)], ids=["by row", "by sample", "by place"])
@pytest.mark.parametrize("positions", PLACEMENTS[1:], ids="+".join)
def test_gated_branches(positions, gate):
    """By row and expert, or broadcast to the rows: autograd's numbers, and the definition's with masks."""
    call = make_call(prologue="rms_norm", positions=positions, activation="silu", gate=gate, rank=4, bias=True)
    tensors = call.named_tensors()
    assert sum(name.endswith("gate") for name in tensors) == len(positions)

    def function(*values):
        replacement = dict(zip(map(id, tensors.values()), values, strict=True))
        moved = call.map(lambda tensor: replacement[id(tensor)])
        return fused_linear(*moved.arguments(), **moved.options)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)
    for prologue, activation in itertools.product(PROLOGUES, ACTIVATIONS):
        call = make_call(
            prologue=prologue, positions=positions, activation=activation, num_segments=2, dropout=0.3, out_scale=True,
            gate=gate, rank=4,
        )  # fmt: skip
        outputs, upstream, grads = run(call, fused_linear)
        truth, _, true_grads = run(call, fused_linear_ref, upstream=upstream)
        for actual, expected in zip(outputs, truth, strict=True):
            assert_exact(actual, expected, f"{prologue} {activation}")
        for name, grad in grads.items():
            assert_exact(grad, true_grads[name], f"{prologue} {activation} d{name}")


def test_a_gate_alone_is_trained_and_one_hot_gates_choose():
    """Each row meets the expert that its gate names, as if it were alone with it."""
    call = make_call(positions=("parallel",), rank=6, gate=(2, 2, 3))
    names = {id(tensor): name for name, tensor in call.named_tensors().items()}
    alone = call.map(lambda tensor: tensor.detach().requires_grad_(names[id(tensor)].endswith("gate")))
    _, upstream, grads = run(alone, fused_linear)
    assert list(grads) == ["0.parallel0.gate"]
    assert_exact(grads["0.parallel0.gate"], run(call, fused_linear, upstream=upstream)[2]["0.parallel0.gate"])
    (segment,) = call.segments
    (branch,) = segment.branches
    chosen = torch.tensor([[0, 2], [1, 2]])
    gate = torch.nn.functional.one_hot(chosen, 3).double()
    (y,) = as_tuple(fused_linear(call.x[0], [segment._replace(branches=(branch._replace(gate=gate),))]))
    for row in itertools.product(range(2), range(2)):
        rows = slice(2 * int(chosen[row]), 2 * int(chosen[row]) + 2)
        expert = Branch(branch.down[rows], branch.up[:, rows], branch.scaling)
        assert_exact(y[row], as_tuple(fused_linear(call.x[0][row], [segment._replace(branches=(expert,))]))[0])


# Errors of a tiny case are a few coin flips of rounding: they are judged over several draws together.
SEEDS = range(4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize(
    "rows, width, num_out, rank", [(1, 33, 130, 1), (7, 130, 33, 3), (33, 64, 7, 16), (130, 7, 48, 5)]
)
def test_hostile_shapes_in_training_dtypes(dtype, prologue, rows, width, num_out, rank):
    for positions in PLACEMENTS:
        results: dict[str, list] = {}
        for seed in SEEDS:
            call = make_call(
                prologue=prologue, positions=positions, activation="tanh", bias=True, residual=True, dropout=0.2,
                lead=(rows,), width=width, num_out=num_out, rank=rank, dtype=dtype, seed=seed,
            )  # fmt: skip
            wide = call.map(lambda tensor: tensor.detach().double().requires_grad_())
            outputs, upstream, grads = run(call, fused_linear)
            eager, _, eager_grads = run(call, fused_linear_ref, upstream=upstream)
            truth, _, true_grads = run(wide, fused_linear_ref, upstream=[grad.double() for grad in upstream])
            results.setdefault("y", []).append((outputs[0], eager[0], truth[0]))
            for name, grad in grads.items():
                results.setdefault(f"d{name}", []).append((grad, eager_grads[name], true_grads[name]))
        for name, draws in results.items():
            assert_as_close_as_eager(
                *(torch.stack(column) for column in zip(*draws, strict=True)), f"{positions} {name}"
            )


def test_wide_branch_parameters_over_narrow_weights():
    """float32 adapters over a bfloat16 base: outputs are bfloat16, gradients float32."""
    call = make_call(positions=("parallel", "pre", "post"), activation="tanh", dtype=torch.bfloat16, in_scale=True)
    wide = call.map(lambda tensor: tensor)
    wide.segments = [
        seg._replace(
            branches=tuple(
                b._replace(down=b.down.detach().float().requires_grad_(), up=b.up.detach().float().requires_grad_())
                for b in seg.branches
            )
        )
        for seg in call.segments
    ]
    outputs, upstream, grads = run(wide, fused_linear)
    narrow_outputs, _, narrow_grads = run(call, fused_linear, upstream=upstream)
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(outputs[0], narrow_outputs[0])
    for name, grad in grads.items():
        assert grad.dtype == (torch.float32 if name.endswith(("down", "up")) else torch.bfloat16), name
        assert torch.equal(grad.bfloat16(), narrow_grads[name]), name


@pytest.mark.parametrize("prologue", PROLOGUES)
def test_each_gradient_alone(prologue):
    """A tensor that is the only one to require grad gets the gradient it has among all others."""
    call = make_call(
        prologue=prologue, positions=("parallel", "pre", "post"), activation="gelu", bias=True, out_scale=True,
        in_scale=True, residual=True, dropout=0.2,
    )  # fmt: skip
    _, upstream, together = run(call, fused_linear)
    for name in call.named_tensors():
        names = {id(tensor): key for key, tensor in call.named_tensors().items()}
        alone = call.map(lambda t, names=names, name=name: t.detach().requires_grad_(names[id(t)] == name))
        _, _, grads = run(alone, fused_linear, upstream=upstream)
        assert list(grads) == [name]
        assert_exact(grads[name], together[name], name)


def test_nothing_requires_grad_and_empty_batch():
    call = make_call(positions=("parallel",), prologue="rms_norm").map(torch.Tensor.detach)
    assert not fused_linear(*call.arguments(), **call.options).requires_grad
    empty = make_call(positions=("parallel", "post"), lead=(0, 3), bias=True, dropout=0.1)
    outputs, _, grads = run(empty, fused_linear)
    assert outputs[0].shape == (0, 3, 5)
    assert all(grad.abs().sum() == 0 for grad in grads.values())


def test_non_contiguous_input():
    call = make_call(positions=("parallel",), prologue="rms_norm", lead=(3, 4))
    strided = torch.empty(4, 3, 12, dtype=torch.float64)[..., ::2].transpose(0, 1)
    strided.copy_(call.x[0].detach())
    call_strided = make_call(positions=("parallel",), prologue="rms_norm", lead=(3, 4))
    call_strided.x = (strided.requires_grad_(),)
    outputs, upstream, grads = run(call, fused_linear)
    strided_outputs, _, strided_grads = run(call_strided, fused_linear, upstream=upstream)
    assert torch.equal(outputs[0], strided_outputs[0])
    assert all(torch.equal(grads[name], strided_grads[name]) for name in grads)


def test_second_backward_equals_the_first():
    call = make_call(prologue="swiglu", positions=("parallel", "post"), dropout=0.3, out_scale=True)
    outputs = as_tuple(fused_linear(*call.arguments(), **call.options))
    tensors = list(call.named_tensors().values())
    first, second = (
        torch.autograd.grad(outputs, tensors, [torch.ones_like(y) for y in outputs], retain_graph=True)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_saved_for_backward_is_input_and_rank_sized():
    """rms_norm prologue, LoRA: x, rstd and a; nothing of the size of h or y."""
    rows, width, num_out, rank = 64, 32, 48, 4
    call = make_call(
        prologue="rms_norm", positions=("parallel",), lead=(rows,), width=width, num_out=num_out, rank=rank,
        num_segments=2, dtype=torch.float32, dropout=0.1,
    )  # fmt: skip
    frozen = {id(seg.weight) for seg in call.segments} | {id(call.options["gain"])}
    call = call.map(lambda tensor: tensor.detach().requires_grad_(id(tensor) not in frozen))
    parameters = sum(t.numel() * 4 for name, t in call.named_tensors().items() if name != "x0")
    seed_bytes = call.options["seed"].element_size()
    with saved_bytes() as saved:
        fused_linear(*call.arguments(), **call.options)
    expected = 4 * rows * (width + 1 + 2 * rank) + parameters + seed_bytes
    assert saved.bytes == expected


def test_frozen_linear_without_prologue_saves_only_its_weight():
    x, weight = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16)
    with saved_bytes() as saved:
        fused_linear(x, [Segment(weight)])
    assert saved.bytes == weight.numel() * 4


def test_independent_streams_draw_different_masks():
    x = torch.ones(64, 64)
    down, up = torch.eye(64), torch.eye(64)

    def output(stream):
        branch = Branch(down, up, dropout=0.5, stream=stream)
        return fused_linear(x, [Segment(torch.zeros(64, 64), None, (branch,))], seed=torch.tensor(3))

    assert torch.equal(output(0), output(0))
    assert not torch.equal(output(0), output(1))


def test_under_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
        branch = Branch(torch.empty(4, 8), torch.empty(6, 4), dropout=0.1)
        y = fused_linear(x, [Segment(torch.empty(6, 8, dtype=torch.bfloat16), None, (branch,))])
        y.sum().backward()
        assert y.shape == (2, 3, 6) and x.grad.shape == x.shape


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.randn(2, 7)}, r"expected weight \[N, 7\] in segment 0, got \[5, 6\]"),
        ({"x": torch.randn(2, 6, dtype=torch.float64)}, "expected weight of x's dtype torch.float64"),
        ({"prologue": "layer_norm"}, "expected prologue in .*'layer_norm'"),
        ({"prologue": "rms_norm"}, "expected a gain with prologue 'rms_norm'"),
        ({"in_scale": torch.ones(3)}, r"expected in_scale \[6\], got \[3\]"),
        ({"residual": torch.zeros(2, 4)}, r"expected residual \[2, 5\].*got \[2, 4\]"),
        ({"branch": Branch(torch.ones(2, 5), torch.ones(5, 2))}, r"parallel branch with down \[2, 6\]"),
        ({"branch": Branch(torch.ones(2, 6), torch.ones(5, 2), dropout=1.0)}, r"expected dropout in \[0, 1\), got 1.0"),
        ({"branch": Branch(torch.ones(2, 6), torch.ones(5, 2), activation="selu")}, "expected activation in .*'selu'"),
        (
            {"branch": Branch(torch.ones(2, 6), torch.ones(5, 2), gate=torch.ones(2, 3))},
            r"a gate of experts that divide the rank 2 in segment 0, got \[2, 3\]",
        ),
        (
            {"branch": Branch(torch.ones(2, 6), torch.ones(5, 2), gate=torch.ones(3, 2))},
            r"a gate that can be broadcast to \[2, 'experts'\], got \[3, 2\]",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(change, message):
    x = change.pop("x", torch.randn(2, 6))
    branch = change.pop("branch", None)
    segment = Segment(torch.randn(5, 6), None, () if branch is None else (branch,))
    with pytest.raises(ValueError, match=message):
        fused_linear(x, [segment], **change)

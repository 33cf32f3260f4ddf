"""Every op as a compiler sees it: the same numbers as without one, and opaque ops that keep an op's contract."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mmpeft_fast.ops import provider
from mmpeft_fast.ops.attention import HeadTransform, attention
from mmpeft_fast.ops.cross_entropy import linear_cross_entropy
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.ops.providers import why_not_installed
from mmpeft_fast.ops.rms_norm import rms_norm
from tests.closeness import assert_as_close_as_eager
from tests.ops.calls import as_tuple, make_call

LINEARS = {
    "frozen gate and up": {"num_segments": 2, "frozen": ("weight",)},
    "lora on q, k, v": {
        "prologue": "rms_norm", "positions": ("parallel",), "num_segments": 3, "dropout": 0.3, "carry": True,
        "frozen": ("weight", "gain"),
    },
    "two masks, bias, trained weights": {
        "positions": ("parallel", "post"), "dropout": 0.4, "bias": True, "residual": True,
    },
    "adapter below swiglu": {
        "prologue": "swiglu", "positions": ("pre", "post"), "activation": "tanh", "residual": True,
        "frozen": ("weight",),
    },
    "gated": {"positions": ("parallel", "post"), "rank": 4, "gate": (2, 1, 2), "dropout": 0.2, "activation": "tanh"},
    "ia3": {"prologue": "swiglu", "in_scale": True, "out_scale": True, "frozen": ("weight",)},
    "one input trained": {"prologue": "swiglu", "frozen": ("weight", "x0")},
    "one row": {"prologue": "rms_norm", "positions": ("parallel",), "lead": (1,), "num_segments": 2},
    "no row": {"prologue": "rms_norm", "positions": ("parallel",), "lead": (0,), "dropout": 0.2},
}  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_case(name):
    options = {"lead": (2, 7), "width": 33, "num_out": 20, "rank": 3} | LINEARS[name]
    frozen, carry = options.pop("frozen", ()), options.pop("carry", False)
    call = make_call(dtype=torch.float32, **options)
    for tensor_name, tensor in call.named_tensors().items():
        tensor.requires_grad_(not tensor_name.endswith(frozen))
    return (lambda: fused_linear(*call.arguments(), **call.options, carry=carry)), call.named_tensors().values()


def attention_case(
    *, heads=4, kv_heads=2, rows=False, scaled=False, normed=False, prefix=False, masked=False, beside=True
):
    batch, length, head_dim = 2, 7, 8
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    q, k, v = random(batch, length, sum(widths)).split(widths, dim=-1)
    index = torch.tensor([[1, 6], [0, 3]]) if rows else None
    q = q[:, :2] if rows else q
    q, k, v = (x.detach().requires_grad_() if beside else x.clone().requires_grad_() for x in (q, k, v))
    cos, sin = random(1, length, head_dim, seed=1).cos(), random(1, length, head_dim, seed=2).sin()
    options = {"rows": index, "eps": 1e-6}
    trained = [q, k, v]
    if scaled:
        scales = [random(width, seed=3).requires_grad_() for width in widths]
        options |= {"q_how": HeadTransform(scales[0]), "k_how": HeadTransform(scales[1]), "v_scale": scales[2]}
        trained += scales
    if normed:
        gains = [random(head_dim, seed=4).requires_grad_() for _ in range(2)]
        options |= {"q_how": HeadTransform(None, gains[0]), "k_how": HeadTransform(None, gains[1])}
        trained += gains
    if prefix:
        options["prefix"] = tuple(random(kv_heads, 3, head_dim, seed=5 + i).requires_grad_() for i in range(2))
        trained += options["prefix"]
    if masked:
        mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1).clone()
        mask[0, ..., :3] = False  # left padding: rows that attend to nothing
        options["mask"] = mask
    return (lambda: attention(q, k, v, cos, sin, head_dim=head_dim, overwrite=False, **options)), trained


def rms_norm_case(*, trained_gain):
    x, gain = random(2, 7, 33).requires_grad_(), random(33, seed=1).requires_grad_(trained_gain)
    return (lambda: rms_norm(x, gain, 1e-6)), [x, gain]


def cross_entropy_case(*, trained_head):
    x, weight, bias = random(9, 33).requires_grad_(), random(50, 33, seed=1), random(50, seed=2)
    labels = torch.tensor([3, -100, 49, 0, 7, -100, 1, 2, 5])
    return (
        (lambda: linear_cross_entropy(x, weight, labels, bias=bias)),
        [x, weight.requires_grad_(trained_head), bias.requires_grad_(trained_head)],
    )


CASES = {
    **{f"linear, {name}": (lambda name=name: linear_case(name)) for name in LINEARS},
    "attention": attention_case,
    "attention, apart": lambda: attention_case(beside=False),
    "attention, some rows": lambda: attention_case(rows=True, prefix=True),
    "attention, scales": lambda: attention_case(scaled=True, masked=True),
    "attention, head norms": lambda: attention_case(normed=True, kv_heads=4),
    "attention, prefix, left padding": lambda: attention_case(prefix=True, masked=True),
    "norm": lambda: rms_norm_case(trained_gain=True),
    "norm, frozen": lambda: rms_norm_case(trained_gain=False),
    "loss": lambda: cross_entropy_case(trained_head=False),
    "loss, trained head": lambda: cross_entropy_case(trained_head=True),
}


def results(function, tensors):
    """Outputs, then the gradients of what requires one."""
    outputs = as_tuple(function())
    grads = torch.autograd.grad([y.sin().sum() for y in outputs], [t for t in tensors if t.requires_grad])
    return [*(y.detach() for y in outputs), *grads]


def assert_compiled_is_the_same(case, backend):
    torch._dynamo.reset()
    function, tensors = CASES[case]()
    expected = results(function, tensors)
    compiled = results(torch.compile(function, fullgraph=True, backend=backend), tensors)
    for i, (before, after) in enumerate(zip(expected, compiled, strict=True)):
        # The same kernels; where tensors lie in wider buffers, a GEMM may add in another order.
        assert_as_close_as_eager(after, before, before, f"result {i}")


@pytest.mark.parametrize("case", CASES)
def test_compiled(case):
    assert_compiled_is_the_same(case, "aot_eager")


@pytest.mark.parametrize("case", CASES)
def test_expanded_gradients(case):
    """The gradient of a sum is one number with strides of zero."""
    function, tensors = CASES[case]()
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    outputs = as_tuple(function())
    expected = torch.autograd.grad(outputs, trained, [torch.ones_like(y) for y in outputs])
    got = torch.autograd.grad(sum(y.sum() for y in as_tuple(function())), trained)
    for i, (before, after) in enumerate(zip(expected, got, strict=True)):
        assert_as_close_as_eager(after, before, before, f"gradient {i}")


@pytest.mark.parametrize("case", ["linear, lora on q, k, v", "attention, scales"])
def test_compiled_on_the_torch_provider(case):
    with provider("torch"):
        assert_compiled_is_the_same(case, "aot_eager")


class Recorder(TorchDispatchMode):
    """The opaque ops that were called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mmpeft_fast" and func._schema.name.endswith(("_forward", "_backward")):
            self.calls.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES)
def test_opaque_ops_keep_the_contract_of_ops(case, monkeypatch):
    """Nothing written, no result a view, fake results as real ones: torch's own checks."""
    function, tensors = CASES[case]()
    with monkeypatch.context() as patch, Recorder() as recorder:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # a compiler's way through the ops, on real tensors
        results(function, tensors)
    assert len(recorder.calls) == (1 if case.startswith("loss") else 2)
    for op, arguments in recorder.calls:
        if case != "linear, no row":  # opcheck cannot make dynamic shapes of none
            torch.library.opcheck(op, arguments)
        storages = [tensor.untyped_storage()._cdata for tensor in op(*arguments)]
        assert len(set(storages)) == len(storages)


def test_a_compiled_backward_runs_on_the_kernels_of_its_forward(monkeypatch):
    if why_not_installed("cpu") is not None:
        pytest.skip(f"one provider only: {why_not_installed('cpu')}")
    torch._dynamo.reset()
    from mmpeft_fast.ops import kernels_cpu, kernels_torch

    ran = []
    for module, name in itertools.product((kernels_cpu, kernels_torch), ("prologue", "prologue_backward")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, original=original, module=module, **kw: ran.append(module) or original(*args, **kw),
        )
    function, _ = rms_norm_case(trained_gain=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for name, module in (("torch", kernels_torch), ("cpu", kernels_cpu), ("torch", kernels_torch)):
        with provider(name):
            y = compiled()
        y.sum().backward()
        assert ran == [module, module], name
        ran.clear()

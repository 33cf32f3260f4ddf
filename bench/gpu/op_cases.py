"""Correctness cases of whole ops through autograd: a provider's forward and every gradient against the definition."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.judge import mapped
from bench.gpu.shapes import DIMS, linear_calls
from mmpeft_fast.documents import Documents
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.ops.attention import HeadTransform, attention, attention_ref
from mmpeft_fast.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from mmpeft_fast.ops.flash import repeated_shapes
from mmpeft_fast.ops.fused_linear import fused_linear, fused_linear_ref
from mmpeft_fast.ops.norms import rms_norm_ref
from mmpeft_fast.ops.rms_norm import rms_norm
from mmpeft_fast.ops.segments import Branch, Segment


class OpCase(NamedTuple):
    """operands(dtype, device, adapters): keyword arguments of `op` and of its definition `ref`, D and U in the dtype
    `adapters`; floating tensors are differentiated, except those under "frozen_<name>"."""

    name: str
    ops: tuple[str, ...]
    operands: Callable[[torch.dtype, str], dict]
    op: Callable[..., tuple[Tensor, ...]]
    ref: Callable[..., tuple[Tensor, ...]]


def with_leaves(operands: dict) -> tuple[dict, list[Tensor]]:
    """The operands with leaves of autograd, and these; a leaf lies where its tensor lies: rows of one buffer stay rows
    of one buffer."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    given = {name: value if name.startswith("frozen_") else mapped(value, leaf) for name, value in operands.items()}
    return given, leaves


def forward_and_gradients(function: Callable[..., tuple[Tensor, ...]], operands: dict) -> dict[str, Tensor]:
    """Outputs and the gradients of every differentiated operand, by name."""
    arguments, leaves = with_leaves(operands)
    outputs = function(**arguments)
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in outputs]
    grads = torch.autograd.grad(outputs, leaves, upstream)
    return {f"y{i}": y.detach() for i, y in enumerate(outputs)} | {f"d{i}": grad for i, grad in enumerate(grads)}


def _as_tuple(y) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


class _Settings(NamedTuple):
    """What a fused linear is asked for, tensors aside."""

    prologue: str
    positions: tuple[str, ...] = ()
    activation: str = "identity"
    dropout: float = 0.0
    num_segments: int = 1
    bias: bool = False
    out_scale: bool = False
    in_scale: bool = False
    residual: bool = False


def _linear_operands(settings: _Settings, sizes, dtype, device, adapters=None) -> dict:
    """Segments of one weight buffer, as `fuse` stacks them; branch parameters stacked likewise."""
    num_rows, width, num_out, rank = sizes
    torch.manual_seed(0)
    options, count = {"dtype": dtype, "device": device}, settings.num_segments

    def matrices(num_rows: int, num_cols: int, as_dtype=None) -> tuple[Tensor, ...]:
        stacked = torch.randn(count * num_rows, num_cols, **options) * num_cols**-0.5
        return stacked.to(as_dtype or dtype).split(num_rows)

    def vector(size: int, wanted: bool) -> Tensor | None:
        return torch.randn(size, **options) if wanted else None

    branches = [
        (
            matrices(rank, num_out if position == "post" else width, adapters),
            matrices(width if position == "pre" else num_out, rank, adapters),
        )
        for position in settings.positions
    ]
    return {
        "x": tuple(torch.randn(num_rows, width, **options) for _ in range(2 if settings.prologue == "swiglu" else 1)),
        "frozen_weights": matrices(num_out, width),
        "biases": [vector(num_out, settings.bias) for _ in range(count)],
        "out_scales": [vector(num_out, settings.out_scale) for _ in range(count)],
        "branches": branches,
        "gain": vector(width, settings.prologue == "rms_norm"),
        "in_scale": vector(width, settings.in_scale),
        "residual": torch.randn(num_rows, num_out, **options) if settings.residual else None,
        "seed": torch.tensor(0x0123_4567_89AB_CDEF, device=device),
    }


def _linear(function, settings: _Settings, *, x, frozen_weights, biases, out_scales, branches, seed, **options):
    segments = [
        Segment(
            weight, biases[i],
            tuple(
                Branch(downs[i], ups[i], 1.7, settings.activation, position, settings.dropout)
                for position, (downs, ups) in zip(settings.positions, branches, strict=True)
            ),
            out_scales[i],
        )
        for i, weight in enumerate(frozen_weights)
    ]  # fmt: skip
    x = x if len(x) > 1 else x[0]
    return _as_tuple(function(x, segments, prologue=settings.prologue, seed=seed, **options))


_LORA = {"positions": ("parallel",), "dropout": 0.1}
_LINEAR = {
    "lora qkv": _Settings("rms_norm", num_segments=3, bias=True, **_LORA),
    "lora gate_up": _Settings("rms_norm", num_segments=2, **_LORA),
    "lora down": _Settings("swiglu", residual=True, **_LORA),
    "lora o": _Settings("none", residual=True, positions=("parallel",)),
    "ia3 down": _Settings("swiglu", in_scale=True, residual=True),
    "ia3 kv": _Settings("rms_norm", num_segments=2, out_scale=True),
    "adapter gate_up": _Settings("rms_norm", ("pre",), "tanh", 0.1, num_segments=2),
    "adapter down": _Settings("swiglu", ("post",), "tanh", 0.1, residual=True),
    "everything": _Settings(
        "rms_norm", ("parallel", "parallel", "pre", "post", "post"), "gelu", 0.1, 1, True, True, True, True
    ),
}
_LINEAR_SIZES = ((1, 33, 40, 3), (17, 130, 72, 20), (130, 264, 328, 64))


def _attention_operands(sizes, prefix, scales, mask, rows, norms, dtype, device, adapters=None) -> dict:
    batch, length, heads, kv_heads, head_dim = sizes
    torch.manual_seed(0)
    options, widths = {"dtype": dtype, "device": device}, [n * head_dim for n in (heads, kv_heads, kv_heads)]
    angles = torch.rand(1, length, head_dim, device=device) * 6
    full = None
    if mask:
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        real[0, : length // 3] = False
        full = torch.ones(length, length, dtype=torch.bool, device=device).tril() & real[:, None, None, :]
    index = torch.arange(1, length, 3, device=device).expand(batch, -1).contiguous() if rows else None
    qkv = torch.randn(batch, length, sum(widths), **options).split(widths, dim=-1)
    return {
        "q": qkv[0] if index is None else qkv[0][:, index[0]],
        "k": qkv[1],
        "v": qkv[2],
        "frozen_angles": (angles.cos().to(dtype), angles.sin().to(dtype)),
        "scales": [torch.randn(width, **options) if scales else None for width in widths],
        "prefix": tuple(torch.randn(kv_heads, prefix, head_dim, **options) for _ in range(2)) if prefix else None,
        "gains": [torch.rand(head_dim, **options) + 0.5 if norms else None for _ in range(2)],
        "frozen_mask": full,
        "rows": index,
    }


def _attention(function, head_dim, *, q, k, v, frozen_angles, scales, gains, prefix, frozen_mask, rows):
    out = function(
        q, k, v, *frozen_angles, head_dim=head_dim, mask=frozen_mask, rows=rows, prefix=prefix,
        q_how=HeadTransform(scales[0], gains[0]), k_how=HeadTransform(scales[1], gains[1]), v_scale=scales[2],
    )  # fmt: skip
    return (out,)


def _attention_of_repeated_shapes(*args, **options) -> Tensor:
    """`attention` on the library's kernels that plan for a shape, none of which run where bits have to repeat."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        with repeated_shapes():
            return attention(*args, **options)
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def _tree(k: Tensor) -> Documents:
    """Half of each row a context, behind it answers of two lengths, and a document for itself."""
    length = k.shape[1]
    answers = (length // 8, length // 5)
    rest = length - length // 2 - sum(answers)
    return Documents((((length // 2, -1), *((size, 0) for size in answers), (rest, -1)),) * len(k))


def _attention_of_documents(q, k, *args, mask, **options) -> Tensor:
    return attention(q, k, *args, documents=_tree(k), **options)


def _attention_of_documents_ref(q, k, *args, mask, **options) -> Tensor:
    return attention_ref(q, k, *args, mask=_tree(k).mask(k.shape[1], k.device), **options)


def _loss_operands(num_rows, width, num_words, dtype, device, adapters=None) -> dict:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    labels = torch.randint(num_words, (num_rows,), device=device)
    labels[1:2] = IGNORE_INDEX
    return {
        "x": torch.randn(num_rows, width, **options),
        "frozen_weight": torch.randn(num_words, width, **options) * width**-0.5,
        "labels": labels,
    }


def op_cases() -> Iterator[OpCase]:
    """All cases, the ones of 7B models last."""
    for name, settings in _LINEAR.items():
        for sizes in _LINEAR_SIZES:
            label = f"fused_linear {name} {'x'.join(map(str, sizes))}"
            yield linear_case(label, settings, sizes)
    for label, sizes in (
        ("gqa", (2, 33, 6, 2, 64)), ("mha", (2, 130, 4, 4, 24)), ("llama-7b", (1, 700, 32, 32, 128)),
    ):  # fmt: skip
        for prefix, scales, mask, rows, norms in (
            (0, False, False, False, False), (20, False, False, False, False), (20, False, True, False, False),
            (0, True, False, True, False), (0, False, False, False, True), (3, True, True, True, True),
        ):  # fmt: skip
            parts = (
                ["prefix"] * bool(prefix) + ["scales"] * scales + ["mask"] * mask + ["rows"] * rows + ["norms"] * norms
            )
            operands = partial(_attention_operands, sizes, prefix, scales, mask, rows, norms)
            name = " ".join(["attention", label, *parts])
            run = (partial(_attention, function, sizes[-1]) for function in (attention, attention_ref))
            yield OpCase(name, ("attention",), operands, *run)
            if not (mask or rows):
                run = (
                    partial(_attention, function, sizes[-1])
                    for function in (_attention_of_repeated_shapes, attention_ref)
                )
                yield OpCase(f"{name} of repeated shapes", ("attention",), operands, *run)
                run = (
                    partial(_attention, function, sizes[-1])
                    for function in (_attention_of_documents, _attention_of_documents_ref)
                )
                yield OpCase(f"{name} of documents", ("attention",), operands, *run)
    for sizes in ((1, 33, 40), (130, 264, 1000), (200, 512, 152064)):
        run = (partial(_loss, function) for function in (linear_cross_entropy, linear_cross_entropy_ref))
        label = f"linear_cross_entropy {'x'.join(map(str, sizes))}"
        yield OpCase(label, ("linear_cross_entropy",), partial(_loss_operands, *sizes), *run)
    for dims in ("llama-7b", "qwen2.5-7b"):
        yield from layer_cases(dims, 64, 1024, 0.1)


def layer_cases(dims: str, r: int, m: int, p: float) -> Iterator[OpCase]:
    """The linear calls of a decoder layer with LoRA; every segment as wide as the first."""
    for call, (prologue, width, num_outs, bias, residual) in linear_calls(DIMS[dims]).items():
        settings = _Settings(prologue, ("parallel",), "identity", p, len(num_outs), bias, residual=residual)
        yield linear_case(f"fused_linear {dims} {call} r{r} M{m}", settings, (m, width, num_outs[0], r))


def timed_cases(dims: str, r: int, m: int, p: float) -> Iterator[OpCase]:
    """One case an op at a decoder's sizes, the linear calls first."""
    sizes = DIMS[dims]
    yield from layer_cases(dims, r, m, p)
    heads = (1, m, sizes.heads, sizes.kv_heads, sizes.head_dim)
    run = (partial(_attention, function, sizes.head_dim) for function in (attention, attention_ref))
    operands = partial(_attention_operands, heads, 20, False, False, False, False)
    yield OpCase(f"attention {dims} prefix M{m}", ("attention",), operands, *run)
    run = (partial(_norm, function) for function in (rms_norm, rms_norm_ref))
    yield OpCase(f"rms_norm {dims} M{m}", ("rms_norm",), partial(_norm_operands, (m, sizes.hidden)), *run)
    run = (partial(_loss, function) for function in (linear_cross_entropy, linear_cross_entropy_ref))
    operands = partial(_loss_operands, m, sizes.hidden, sizes.vocab)
    yield OpCase(f"linear_cross_entropy {dims} M{m}", ("linear_cross_entropy",), operands, *run)


def _norm_operands(sizes, dtype, device, adapters=None) -> dict:
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    return {"x": torch.randn(*sizes, **options), "gain": torch.rand(sizes[-1], **options) + 0.5}


def _norm(function, *, x, gain):
    return (function(x, gain, 1e-6),)


def _loss(function, *, x, frozen_weight, labels):
    return (function(x, frozen_weight, labels),)


def linear_case(label: str, settings: _Settings, sizes) -> OpCase:
    ops = ("fused_linear", "rms_norm") if settings.prologue == "rms_norm" else ("fused_linear",)
    run = (partial(_linear, function, settings) for function in (fused_linear, fused_linear_ref))
    return OpCase(label, ops, partial(_linear_operands, settings, sizes), *run)

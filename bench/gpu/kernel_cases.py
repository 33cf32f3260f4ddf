"""Correctness cases of the kernel set: what goes into each of its functions, and what comes out, by name.

The function of the torch provider is the definition: in float64 it is the truth, in the case's dtype the yardstick.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mmpeft_fast.ops.kernel_set import HeadTransform, LowRank, Mask, PrologueSpec, Rotation, Term
from mmpeft_fast.ops.norms import rms_norm_forward

_EPS = 1e-5
# (rows, depth, columns, rank): ragged, aligned for vector loads and TMA, and a layer's of 7B models.
RAGGED = ((1, 33, 130, 1), (7, 130, 33, 3), (33, 72, 200, 20), (130, 7, 48, 5))
ALIGNED = ((64, 128, 256, 16), (200, 512, 768, 64))
LARGE = ((1024, 4096, 11008, 16), (2048, 3584, 512, 64), (512, 18944, 3584, 128))
# Several processes check at once, each with float64 copies of its case.
_MOST_WEIGHTS = 10**8


class Case(NamedTuple):
    """operands(dtype, device) gives keyword arguments; run(kernels, **operands) the outputs by name.

    ops: the ops of `dispatch.OPS` that rest on it.
    """

    name: str
    ops: tuple[str, ...]
    operands: Callable[[torch.dtype, str], dict]
    run: Callable[..., dict[str, Tensor | None]]


class _Random:
    """Tensors of one dtype on one device; `columns` gives matrices whose rows do not follow one another."""

    def __init__(self, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        self.options = {"dtype": dtype, "device": device}

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, **self.options)

    def matrix(self, num_rows: int, num_cols: int) -> Tensor:
        return self.normal(num_rows, num_cols) * num_cols**-0.5

    def columns(self, num_rows: int, num_cols: int) -> Tensor:
        return self.normal(num_rows, num_cols + 8)[:, :num_cols]

    def seed(self) -> Tensor:
        return torch.tensor(0x0123_4567_89AB_CDEF, device=self.options["device"])


def _inputs(random: _Random, name: str, num_rows: int, width: int) -> tuple[Tensor, ...]:
    """Gate and up as columns of one buffer, as their GEMM leaves them."""
    count = 2 if name == "swiglu" else 1
    return random.columns(num_rows, count * width).split(width, dim=1)


def _prologue_operands(name, with_scale, with_branch, p, sizes, dtype, device):
    num_rows, width, _, rank = sizes
    random = _Random(dtype, device)
    return {
        "x": _inputs(random, name, num_rows, width),
        "gain": random.normal(width) if name == "rms_norm" else None,
        "in_scale": random.normal(width) if with_scale else None,
        "down": random.matrix(rank, width) if with_branch else None,
        "da": random.normal(num_rows, rank) if with_branch else None,
        "dh": random.normal(num_rows, width),
        "dresidual": None if name == "swiglu" else random.columns(num_rows, width),
        "seed": random.seed(),
    }


def _low_rank(down, p, seed):
    return None if down is None else LowRank(down, Mask(p, 2, seed) if p else None)


def _prologue(kernels, *, name, p, x, gain, in_scale, down, seed, **_):
    h, _, a = kernels.prologue(PrologueSpec(name, gain, _EPS, in_scale), x, _low_rank(down, p, seed))
    return {"h": h, "a": a}


def _prologue_backward(kernels, *, name, p, x, gain, in_scale, down, da, dh, dresidual, seed):
    low_rank = [] if down is None else [(_low_rank(down, p, seed), da)]
    rstd = rms_norm_forward(x[0], gain, _EPS)[1] if name == "rms_norm" else None
    grads = kernels.prologue_backward(
        PrologueSpec(name, gain, _EPS, in_scale), dh, x, rstd, low_rank=low_rank, ddown_wanted=[True] * len(low_rank),
        need_dx=(True,) * len(x), need_dgain=gain is not None, need_din_scale=in_scale is not None,
        dresidual=dresidual,
    )  # fmt: skip
    outputs = {f"dx{i}": part for i, part in enumerate(grads.dx)}
    return outputs | {"dgain": grads.dgain, "din_scale": grads.din_scale, **dict.fromkeys(["ddown"], *grads.ddowns)}


def _gemm_operands(num_segments, extras, sizes, dtype, device):
    num_rows, depth, num_out, rank = sizes
    random = _Random(dtype, device)
    return {
        "x": random.columns(num_rows, depth),
        "weight": random.matrix(num_segments * num_out, depth),
        "z": random.normal(num_rows, num_segments * rank),
        "up": random.matrix(num_segments * num_out, rank),
        "bias": random.normal(num_segments * num_out) if extras else None,
        "residual": random.columns(num_rows, num_segments * num_out) if extras else None,
    }


def _terms(z, up, num_segments):
    num_out, rank = up.shape[0] // num_segments, up.shape[1]
    ups, zs = up.split(num_out), z.split(rank, dim=1)
    return [Term(zs[i], ups[i], 1.7, i * num_out, (i + 1) * num_out) for i in range(num_segments)]


def _lowrank_gemm(kernels, *, num_segments, x, weight, z, up, bias, residual):
    return {"y": kernels.lowrank_gemm(x, weight, _terms(z, up, num_segments), bias=bias, residual=residual)}


def _dx_operands(with_into, sizes, dtype, device):
    num_rows, depth, num_out, _ = sizes
    random = _Random(dtype, device)
    return {
        "dy": random.columns(num_rows, num_out),
        "weight": random.matrix(num_out, depth),
        "into": random.normal(num_rows, depth) if with_into else None,
    }


def _lowrank_gemm_dx(kernels, *, dy, weight, into):
    return {"dx": kernels.lowrank_gemm_dx(dy, weight, into=into)}


def _dy_operands(num_segments, sizes, dtype, device):
    num_rows, _, num_out, rank = sizes
    random = _Random(dtype, device)
    return {
        "dy": random.columns(num_rows, num_segments * num_out),
        "a": random.normal(num_rows, num_segments * rank),
        "up": random.matrix(num_segments * num_out, rank),
    }


def _dy_pass(kernels, *, num_segments, activation, dy, a, up):
    num_out, rank = up.shape[0] // num_segments, up.shape[1]
    das, dups = kernels.dy_pass(
        dy.split(num_out, dim=1), a.split(rank, dim=1), up.split(num_out), scalings=[1.7] * num_segments,
        activations=[activation] * num_segments, need_da=[True] * num_segments, need_dup=[True] * num_segments,
    )  # fmt: skip
    return {"da": torch.cat(das, dim=1), "dup": torch.cat(dups)}


def _post_operands(sizes, dtype, device):
    num_rows, _, num_out, rank = sizes
    random = _Random(dtype, device)
    return {
        "y": random.columns(num_rows, num_out),
        "down": random.matrix(rank, num_out),
        "up": random.matrix(num_out, rank),
        "residual": random.normal(num_rows, num_out),
        "seed": random.seed(),
    }


def _post_branch(kernels, *, p, y, down, up, residual, seed):
    out, a = kernels.post_branch(
        y, down, up, scaling=1.7, activation="tanh", mask=Mask(p, 2, seed) if p else None, residual=residual
    )
    return {"out": out, "a": a}


def _heads_operands(batch, length, heads, kv_heads, head_dim, scales, norms, dtype, device):
    random = _Random(dtype, device)
    widths = [count * head_dim for count in (heads, kv_heads, kv_heads)]
    angles = torch.rand(batch, length, head_dim, device=device) * 6
    return {
        "qkv": random.normal(batch, length, sum(widths)).split(widths, dim=-1),
        "scales": [random.normal(width) if scales else None for width in widths],
        "gains": [random.normal(head_dim) if norms else None] * 2,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "grads": [random.normal(batch, length, count, head_dim) for count in (heads, kv_heads, kv_heads)],
    }


def _heads(kernels, *, head_dim, qkv, scales, gains, cos, sin, grads):
    how = tuple(HeadTransform(scale, gain) for scale, gain in zip(scales, (*gains, None), strict=True))
    rotation, options = Rotation(cos, sin, cos, sin), {"head_dim": head_dim, "eps": _EPS}
    outputs = dict(zip("qkv", kernels.heads(*qkv, how, rotation, **options), strict=True))
    needs = [(True, part.scale is not None, part.gain is not None) for part in how]
    dqkv = kernels.heads_backward(
        tuple(grad.transpose(1, 2) for grad in grads), qkv, how, rotation, needs=needs, **options
    )
    for name, three in zip("qkv", dqkv, strict=True):
        outputs |= {f"d{name}": three[0], f"d{name}_scale": three[1], f"d{name}_gain": three[2]}
    return outputs


def _prefix_operands(batch, heads, kv_heads, length, num_prefix, head_dim, dtype, device):
    random = _Random(dtype, device)

    def in_heads() -> Tensor:
        return random.normal(batch, length, heads, head_dim)

    wide = torch.promote_types(dtype, torch.float32)
    alive = torch.ones(batch, 1, length, dtype=torch.bool, device=device)
    alive[0, :, : length // 2] = False
    return {
        "q": in_heads(), "out": in_heads(), "dout": in_heads(), "dq": in_heads(),
        "lse": torch.randn(batch, heads, length, dtype=wide, device=device),
        "prefix_k": random.normal(kv_heads, num_prefix, head_dim),
        "prefix_v": random.normal(kv_heads, num_prefix, head_dim),
        "alive": alive,
    }  # fmt: skip


def _prefix(kernels, *, q, out, dout, dq, lse, prefix_k, prefix_v, alive):
    q, out, dout, dq = (part.transpose(1, 2) for part in (q, out, dout, dq))
    scale = q.shape[-1] ** -0.5
    out, lse = kernels.merge_prefix(q, prefix_k, prefix_v, out, lse, scale=scale, alive=alive)
    dq, dprefix_k, dprefix_v = kernels.prefix_backward(dout, q, prefix_k, prefix_v, out, lse, dq, scale=scale)
    return {"out": out, "lse": lse, "dq": dq, "dprefix_k": dprefix_k, "dprefix_v": dprefix_v}


def _loss_operands(num_rows, num_words, dtype, device):
    random = _Random(dtype, device)
    labels = torch.randint(num_words, (num_rows,), device=device)
    labels[2:3] = -100
    count = (labels != -100).sum()
    return {"logits": 3 * random.columns(num_rows, num_words), "labels": labels, "count": count}


def _cross_entropy(kernels, *, logits, labels, count):
    loss = kernels.cross_entropy_(logits, labels, count, need_grad=True)
    return {"loss": loss, "dlogits": logits}


def _sized(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def kernel_cases() -> Iterator[Case]:
    """All cases, the ones of 7B models last."""
    linear, norm = ("fused_linear",), ("fused_linear", "rms_norm")
    for sizes in (*RAGGED, *ALIGNED, *LARGE):
        for name, scaled, branched, p in (
            ("rms_norm", False, True, 0.1), ("swiglu", True, True, 0.1), ("none", False, True, 0.0),
            ("rms_norm", True, False, 0.0), ("swiglu", False, False, 0.0),
        ):  # fmt: skip
            label = " ".join([name, *["scale"] * scaled, *["branch"] * branched, *["dropout"] * (p > 0)])
            ops = norm if name == "rms_norm" else linear
            operands = partial(_prologue_operands, name, scaled, branched, p, sizes)
            yield Case(f"prologue {label} {_sized(sizes)}", ops, operands, partial(_prologue, name=name, p=p))
            run = partial(_prologue_backward, name=name, p=p)
            yield Case(f"prologue_backward {label} {_sized(sizes)}", ops, operands, run)
        for count, extras in ((1, True), (1, False), (3, False)):
            if count * sizes[1] * sizes[2] > _MOST_WEIGHTS:
                continue
            label = f"{count} segments{' bias residual' if extras else ''} {_sized(sizes)}"
            operands = partial(_gemm_operands, count, extras, sizes)
            yield Case(f"lowrank_gemm {label}", linear, operands, partial(_lowrank_gemm, num_segments=count))
        for into in (False, True):
            label = f"{'into ' if into else ''}{_sized(sizes)}"
            yield Case(f"lowrank_gemm_dx {label}", linear, partial(_dx_operands, into, sizes), _lowrank_gemm_dx)
        for count, activation in ((1, "gelu"), (3, "identity"), (2, "tanh")):
            run = partial(_dy_pass, num_segments=count, activation=activation)
            label = f"{count} segments {activation} {_sized(sizes)}"
            yield Case(f"dy_pass {label}", linear, partial(_dy_operands, count, sizes), run)
        for p in (0.0, 0.1):
            label = f"{'dropout ' if p else ''}{_sized(sizes)}"
            yield Case(f"post_branch {label}", linear, partial(_post_operands, sizes), partial(_post_branch, p=p))
    for sizes in ((1, 1, 2, 1, 8), (2, 17, 5, 5, 24), (2, 33, 6, 2, 64), (2, 700, 32, 32, 128), (1, 2048, 28, 4, 128)):
        for scales, norms in ((False, False), (True, False), (False, True)):
            label = " ".join([*["scales"] * scales, *["norms"] * norms, _sized(sizes)])
            operands = partial(_heads_operands, *sizes, scales, norms)
            yield Case(f"heads {label}", ("attention",), operands, partial(_heads, head_dim=sizes[-1]))
    for sizes in ((1, 1, 1, 1, 2, 8), (2, 4, 2, 33, 20, 24), (2, 6, 2, 130, 40, 64), (2, 32, 32, 700, 20, 128)):
        yield Case(f"prefix {_sized(sizes)}", ("attention",), partial(_prefix_operands, *sizes), _prefix)
    for sizes in ((1, 7), (7, 130), (33, 32064), (200, 152064)):
        operands = partial(_loss_operands, *sizes)
        yield Case(f"cross_entropy {_sized(sizes)}", ("linear_cross_entropy",), operands, _cross_entropy)

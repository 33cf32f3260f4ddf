"""Bandwidth of the C++ kernels against a copy's, interleaved: python -m bench.cpu_kernels --dtype bf16 --out FILE.

Bytes are those of every array a kernel has to read or write, once. Sizes are beyond the caches; all threads run. Rows
say what bounds a kernel where it is not memory: Philox's multiplications with dropout, multiply-adds with a prefix.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.rows import append_rows, environment, interleaved, quantiles
from mmpeft_fast.ops import csrc, kernels_cpu, kernels_torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OPS = torch.ops.mmpeft_fast_c
_DROPOUT = 0.05


@dataclass(frozen=True)
class Kernel:
    """One launch on arrays that are there already, and the bytes it has to move."""

    run: Callable[[], object]
    num_bytes: int
    bound: str = "memory"


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_prologues(rows: int, width: int, dtype: torch.dtype) -> dict[str, Kernel]:
    x, up, h, dropped, low, dh, residual = (torch.randn(rows, width).to(dtype) for _ in range(7))
    dx, dup = torch.empty_like(x), torch.empty_like(x)
    gain, scale, rstd = torch.randn(width).to(dtype), torch.randn(width), torch.rand(rows) + 0.5
    dgain, din_scale = torch.empty(width), torch.empty(width)
    seed = torch.tensor(1)
    mask, no_mask = (seed, _DROPOUT, 0), (None, 0.0, 0)

    def forward(name, *, in_scale=None, dropout=mask, h=h, dropped=dropped):
        given = (x, up) if name == "swiglu" else (x, None)
        norm = (gain, 1e-6) if name == "rms_norm" else (None, 1e-6)
        out = rstd if name == "rms_norm" else None
        arrays = [array for array in (*given, h, dropped) if array is not None]
        return Kernel(
            lambda: _OPS.prologue(name, *given, *norm, in_scale, None, *dropout, h, dropped, out),
            _bytes_of(*arrays),
            "philox" if dropout is mask else "memory",
        )

    def backward(name, *, low=low, dropout=mask, x=x, dropped=dropped, gains=None, scales=None, residual=None):
        is_norm, is_swiglu = name == "rms_norm", name == "swiglu"
        given, wanted = (x, up if is_swiglu else None), (dx, dup if is_swiglu else None)
        in_scale = scale if scales is not None else None
        arrays = [array for array in (dh, low, *given, residual, *wanted, dropped) if array is not None]
        return Kernel(
            lambda: _OPS.prologue_backward(
                name, dh, low, 1.05, *dropout, *given, gain if is_norm else None, in_scale, rstd if is_norm else None,
                residual, *wanted, dropped, gains, scales,
            ),
            _bytes_of(*arrays), "philox" if dropout is mask else "memory",
        )  # fmt: skip

    plain = {"low": None, "dropout": no_mask, "dropped": None}
    return {
        "rms_norm": forward("rms_norm", dropout=no_mask, dropped=None),
        "rms_norm dropout": forward("rms_norm"),
        "swiglu": forward("swiglu", dropout=no_mask, dropped=None),
        "swiglu dropout": forward("swiglu"),
        "swiglu scale": forward("swiglu", in_scale=scale, dropout=no_mask, dropped=None),
        "drop": forward("none", h=None),
        "rms_norm backward": backward("rms_norm", **plain),
        "rms_norm backward gain": backward("rms_norm", **plain, gains=dgain),
        "rms_norm backward dropout": backward("rms_norm", residual=residual),
        "swiglu backward": backward("swiglu", **plain),
        "swiglu backward dropout": backward("swiglu"),
        "swiglu backward scale": backward("swiglu", **plain, scales=din_scale),
        "masked add": backward("none", x=None, dropped=None),
        "post backward": backward("none"),
    }


def make_heads(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Kernel]:
    batch, length, width = 4, rows // 4, heads * head_dim
    x, dy, out = (torch.randn(batch, length, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(3))
    cos, sin = (torch.randn(1, length, head_dim).to(dtype) for _ in range(2))
    scale, gain = torch.randn(width), torch.randn(head_dim).to(dtype)
    dscale, dgain = torch.empty(width), torch.empty(head_dim)

    def forward(scale, gain):
        return Kernel(lambda: _OPS.heads(x, scale, gain, 1e-6, cos, sin, out), _bytes_of(x, out))

    def backward(scale, gain, dscale, dgain):
        given = None if scale is None and gain is None else x
        arrays = [array for array in (dy, given, out) if array is not None]
        return Kernel(
            lambda: _OPS.heads_backward(dy, given, scale, gain, 1e-6, cos, sin, out, dscale, dgain), _bytes_of(*arrays)
        )

    return {
        "heads": forward(None, None),
        "heads scale": forward(scale, None),
        "heads norm": forward(None, gain),
        "heads backward": backward(None, None, None, None),
        "heads backward scale": backward(scale, None, dscale, None),
        "heads backward norm": backward(None, gain, None, dgain),
    }


def make_prefix(rows: int, heads: int, head_dim: int, num_prefix: int, dtype: torch.dtype) -> dict[str, Kernel]:
    shape = (4, rows // 4, heads, head_dim)
    q, out, dout, dq = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(4))
    prefix_k, prefix_v = (torch.randn(heads, num_prefix, head_dim) for _ in range(2))
    lse, scale = torch.randn(shape[0], heads, shape[1]), head_dim**-0.5
    forward_bytes, backward_bytes = _bytes_of(q, out, out, lse, lse), _bytes_of(dout, q, out, lse, dq, dq)
    forward, backward = (q, prefix_k, prefix_v, out, lse), (dout, q, prefix_k, prefix_v, out, lse, dq)
    kernels = {}
    for name, provider in (("prefix", kernels_cpu), ("torch's prefix", kernels_torch)):
        kernels[name] = Kernel(
            lambda provider=provider: provider.merge_prefix(*forward, scale=scale, alive=None),
            forward_bytes,
            "multiply-adds",
        )
        kernels[f"{name} backward"] = Kernel(
            lambda provider=provider: provider.prefix_backward(*backward, scale=scale),
            backward_bytes,
            "multiply-adds",
        )
    return kernels


def make_rest(rows: int, width: int, vocab: int, dtype: torch.dtype) -> dict[str, Kernel]:
    a, dz, z = (torch.randn(rows, width).to(dtype) for _ in range(3))
    labelled = max(1, rows * width // vocab)
    logits, labels = torch.randn(labelled, vocab).to(dtype), torch.randint(vocab, (labelled,))
    count, loss = torch.tensor(labelled), torch.empty(())
    kernels = {
        "cross_entropy": Kernel(
            lambda: _OPS.cross_entropy(logits, labels, count, True, loss), _bytes_of(logits, logits)
        ),
    }
    for name in ("tanh", "relu", "gelu", "silu"):
        kernels[name] = Kernel(lambda name=name: _OPS.activation(name, a, None, z), _bytes_of(a, z))
        kernels[f"{name} backward"] = Kernel(lambda name=name: _OPS.activation(name, a, dz, z), _bytes_of(a, dz, z))
    return kernels


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_kernels", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="some of the names that a run prints")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--num-virtual-tokens", type=int, default=20)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append rows to")
    args = parser.parse_args(arguments)
    module, dtype = csrc.extension(), DTYPES[args.dtype]
    torch.manual_seed(0)
    makers = (
        lambda: make_prologues(args.rows, args.width, dtype),
        lambda: make_heads(args.rows, args.width // args.head_dim, args.head_dim, dtype),
        lambda: make_prefix(args.rows, args.width // args.head_dim, args.head_dim, args.num_virtual_tokens, dtype),
        lambda: make_rest(args.rows, args.width, args.vocab, dtype),
    )
    found = set()
    print(f"{module.instruction_set()}, {torch.get_num_threads()} threads, {args.dtype}")
    for make in makers:
        kernels = {name: kernel for name, kernel in make().items() if not args.kernels or name in args.kernels}
        if not kernels:
            continue
        found |= kernels.keys()
        source = torch.randn(args.rows, args.width).to(dtype)
        target = torch.empty_like(source)
        kernels = {"copy": Kernel(lambda s=source, t=target: t.copy_(s), _bytes_of(source, target)), **kernels}
        times = interleaved({name: kernel.run for name, kernel in kernels.items()}, rounds=args.rounds)
        rows = []
        for name, kernel in kernels.items():
            row = {"op": name, "mode": "kernel", "implementation": "cpu", "dtype": args.dtype, **quantiles(times[name])}
            row |= {"rows": args.rows, "width": args.width, "instruction_set": module.instruction_set()}
            rows.append(row | {"bound": kernel.bound, "gb_s": kernel.num_bytes / row["p50_ms"] / 1e6, **environment()})
        for row in rows:
            row["x_copy"] = row["gb_s"] / rows[0]["gb_s"]
            figures = f"{row['p50_ms']:8.2f} ms {row['gb_s']:7.1f} GB/s {row['x_copy']:6.2f} x copy"
            print(f"{row['op']:28} {figures}  {row['bound']}", flush=True)
        if args.out:
            append_rows(args.out, rows)
    if set(args.kernels) - found:
        parser.error(f"unknown kernels {sorted(set(args.kernels) - found)}")


if __name__ == "__main__":
    main()

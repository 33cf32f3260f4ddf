"""The C++ kernels against what the machine can do, interleaved: python -m bench.cpu_kernels --dtype bf16 --out FILE.

Bytes are those of every array a kernel has to read or write, once; FLOPs those of its formula, where an exponential, a
root or a quotient is one and Philox's integers are none. A kernel takes at least bound = max(bytes / rate of a copy,
FLOPs / rate of a float32 GEMM), both measured between the kernels. Sizes are beyond the caches; all threads run.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.rows import append_rows, environment, interleaved, quantiles
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.ops import csrc, kernels_cpu, kernels_torch

_OPS = torch.ops.mmpeft_fast_c
_DROPOUT = 0.05


@dataclass(frozen=True)
class Kernel:
    """One launch on arrays that are there already, the bytes it has to move and the FLOPs it has to do."""

    run: Callable[[], object]
    num_bytes: int
    num_flops: int


def _bytes_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def make_prologues(rows: int, width: int, dtype: torch.dtype) -> dict[str, Kernel]:
    x, up, h, dropped, low, dh, residual = (torch.randn(rows, width).to(dtype) for _ in range(7))
    dx, dup = torch.empty_like(x), torch.empty_like(x)
    gain, scale, rstd = torch.randn(width).to(dtype), torch.randn(width), torch.rand(rows) + 0.5
    dgain, din_scale = torch.empty(width), torch.empty(width)
    seed = torch.tensor(1)
    mask, no_mask = (seed, _DROPOUT, 0), (None, 0.0, 0)

    def forward(name, flops, *, in_scale=None, dropout=mask, h=h, dropped=dropped):
        given = (x, up) if name == "swiglu" else (x, None)
        norm = (gain, 1e-6) if name == "rms_norm" else (None, 1e-6)
        out = rstd if name == "rms_norm" else None
        arrays = [array for array in (*given, h, dropped) if array is not None]
        return Kernel(
            lambda: _OPS.prologue(name, *given, *norm, in_scale, None, *dropout, h, dropped, out),
            _bytes_of(*arrays),
            flops * x.numel(),
        )

    def backward(name, flops, *, low=low, dropout=mask, x=x, dropped=dropped, gains=None, scales=None, residual=None):
        is_norm, is_swiglu = name == "rms_norm", name == "swiglu"
        given, wanted = (x, up if is_swiglu else None), (dx, dup if is_swiglu else None)
        in_scale = scale if scales is not None else None
        arrays = [array for array in (dh, low, *given, residual, *wanted, dropped) if array is not None]
        return Kernel(
            lambda: _OPS.prologue_backward(
                name, dh, low, 1.05, *dropout, *given, gain if is_norm else None, in_scale, rstd if is_norm else None,
                residual, *wanted, dropped, gains, scales,
            ),
            _bytes_of(*arrays), flops * dh.numel(),
        )  # fmt: skip

    plain = {"low": None, "dropout": no_mask, "dropped": None}
    return {
        "rms_norm": forward("rms_norm", 4, dropout=no_mask, dropped=None),
        "rms_norm dropout": forward("rms_norm", 4),
        "swiglu": forward("swiglu", 5, dropout=no_mask, dropped=None),
        "swiglu dropout": forward("swiglu", 5),
        "swiglu scale": forward("swiglu", 6, in_scale=scale, dropout=no_mask, dropped=None),
        "drop": forward("none", 0, h=None),
        "rms_norm backward": backward("rms_norm", 8, **plain),
        "rms_norm backward gain": backward("rms_norm", 10, **plain, gains=dgain),
        "rms_norm backward dropout": backward("rms_norm", 12, residual=residual),
        "swiglu backward": backward("swiglu", 11, **plain),
        "swiglu backward dropout": backward("swiglu", 14),
        "swiglu backward scale": backward("swiglu", 15, **plain, scales=din_scale),
        "masked add": backward("none", 2, x=None, dropped=None),
        "post backward": backward("none", 2),
    }


def make_heads(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Kernel]:
    batch, length, width = 4, rows // 4, heads * head_dim
    x, dy, out = (torch.randn(batch, length, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(3))
    cos, sin = (torch.randn(1, length, head_dim).to(dtype) for _ in range(2))
    scale, gain = torch.randn(width), torch.randn(head_dim).to(dtype)
    dscale, dgain = torch.empty(width), torch.empty(head_dim)

    def forward(flops, scale, gain):
        return Kernel(lambda: _OPS.heads(x, scale, gain, 1e-6, cos, sin, out), _bytes_of(x, out), flops * x.numel())

    def backward(flops, scale, gain, dscale, dgain):
        given = None if scale is None and gain is None else x
        arrays = [array for array in (dy, given, out) if array is not None]
        return Kernel(
            lambda: _OPS.heads_backward(dy, given, scale, gain, 1e-6, cos, sin, out, dscale, dgain),
            _bytes_of(*arrays),
            flops * dy.numel(),
        )

    return {
        "heads": forward(3, None, None),
        "heads scale": forward(4, scale, None),
        "heads norm": forward(7, None, gain),
        "heads backward": backward(3, None, None, None, None),
        "heads backward scale": backward(6, scale, None, dscale, None),
        "heads backward norm": backward(14, None, gain, None, dgain),
    }


def make_prefix(rows: int, heads: int, head_dim: int, num_prefix: int, dtype: torch.dtype) -> dict[str, Kernel]:
    shape = (4, rows // 4, heads, head_dim)
    q, out, dout, dq = (torch.randn(shape).to(dtype).transpose(1, 2) for _ in range(4))
    prefix_k, prefix_v = (torch.randn(heads, num_prefix, head_dim) for _ in range(2))
    lse, scale = torch.randn(shape[0], heads, shape[1]), head_dim**-0.5
    forward_bytes, backward_bytes = _bytes_of(q, out, out, lse, lse), _bytes_of(dout, q, out, lse, dq, dq)
    forward, backward = (q, prefix_k, prefix_v, out, lse), (dout, q, prefix_k, prefix_v, out, lse, dq)
    product_flops = 2 * num_prefix * q.numel()  # of one of the products of all queries with all virtual tokens
    kernels = {}
    for name, provider in (("prefix", kernels_cpu), ("torch's prefix", kernels_torch)):
        kernels[name] = Kernel(
            lambda provider=provider: provider.merge_prefix(*forward, scale=scale, alive=None),
            forward_bytes,
            2 * product_flops,
        )
        kernels[f"{name} backward"] = Kernel(
            lambda provider=provider: provider.prefix_backward(*backward, scale=scale),
            backward_bytes,
            5 * product_flops,
        )
    return kernels


def make_rest(rows: int, width: int, vocab: int, dtype: torch.dtype) -> dict[str, Kernel]:
    a, dz, z = (torch.randn(rows, width).to(dtype) for _ in range(3))
    labelled = max(1, rows * width // vocab)
    logits, labels = torch.randn(labelled, vocab).to(dtype), torch.randint(vocab, (labelled,))
    count, loss = torch.tensor(labelled), torch.empty(())
    kernels = {
        "cross_entropy": Kernel(
            lambda: _OPS.cross_entropy(logits, labels, count, True, loss), _bytes_of(logits, logits), 7 * logits.numel()
        ),
    }
    for name, flops, backward_flops in (("tanh", 1, 4), ("relu", 1, 1), ("gelu", 5, 9), ("silu", 4, 8)):
        kernels[name] = Kernel(lambda name=name: _OPS.activation(name, a, None, z), _bytes_of(a, z), flops * a.numel())
        kernels[f"{name} backward"] = Kernel(
            lambda name=name: _OPS.activation(name, a, dz, z), _bytes_of(a, dz, z), backward_flops * a.numel()
        )
    return kernels


def make_yardsticks(rows: int, width: int, dtype: torch.dtype) -> dict[str, Kernel]:
    """The rates that bound every kernel: of memory by a copy of the same size, of multiply-adds by a GEMM."""
    source, size = torch.randn(rows, width).to(dtype), 1024
    target = torch.empty_like(source)
    a, b, c = (torch.randn(size, size) for _ in range(3))
    return {
        "copy": Kernel(lambda: target.copy_(source), _bytes_of(source, target), 0),
        "float32 GEMM": Kernel(lambda: torch.mm(a, b, out=c), _bytes_of(a, b, c), 2 * size**3),
    }


def rows_of(kernels: dict[str, Kernel], times: dict[str, list[float]]) -> list[dict]:
    """A row for each kernel: its rates, and how much of a copy's and of its bound they are."""
    median_ms = {name: quantiles(times[name])["p50_ms"] for name in kernels}
    copy_rate = kernels["copy"].num_bytes / median_ms["copy"]
    flop_rate = kernels["float32 GEMM"].num_flops / median_ms["float32 GEMM"]
    rows = []
    for name, kernel in kernels.items():
        bounds_ms = {"memory": kernel.num_bytes / copy_rate, "multiply-adds": kernel.num_flops / flop_rate}
        bound = max(bounds_ms, key=bounds_ms.get)
        rows.append(
            {
                "op": name,
                **quantiles(times[name]),
                "num_bytes": kernel.num_bytes,
                "num_flops": kernel.num_flops,
                "gb_s": kernel.num_bytes / median_ms[name] / 1e6,
                "gflop_s": kernel.num_flops / median_ms[name] / 1e6,
                "x_copy": kernel.num_bytes / median_ms[name] / copy_rate,
                "bound": bound,
                "x_bound": bounds_ms[bound] / median_ms[name],
            }
        )
    return rows


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
        kernels = make_yardsticks(args.rows, args.width, dtype) | kernels
        times = interleaved({name: kernel.run for name, kernel in kernels.items()}, rounds=args.rounds)
        static = {"mode": "kernel", "implementation": "cpu", "dtype": args.dtype, "rows": args.rows}
        static |= {"width": args.width, "instruction_set": module.instruction_set(), **environment()}
        rows = [row | static for row in rows_of(kernels, times)]
        for row in rows:
            rates = f"{row['p50_ms']:8.2f} ms {row['gb_s']:6.1f} GB/s {row['gflop_s']:6.1f} GFLOP/s"
            shares = f"{row['x_copy']:5.2f} x copy {row['x_bound']:5.2f} x bound"
            print(f"{row['op']:26} {rates} {shares}  {row['bound']}", flush=True)
        if args.out:
            append_rows(args.out, rows)
    if set(args.kernels) - found:
        parser.error(f"unknown kernels {sorted(set(args.kernels) - found)}")


if __name__ == "__main__":
    main()

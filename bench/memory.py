"""Memory of a training step by method and implementation, counted on the real model code without memory.

    python -m bench.memory --out results/bench/memory.jsonl

The planner's counts (`mmpeft_fast/plan`): bytes kept for the backward, and the peak with weights, gradients and AdamW.
`frozen` is the stock model's forward and the gradient of its input embeddings. `peft` is HF PEFT with float32 adapters,
or the method as eager modules where HF PEFT has none; `peft_bf16` has adapters in the model's dtype; `_ckpt` is with
activation checkpointing of every layer, `_gate_up` with `fuse(recompute="gate_up")`, `_nf4` on a base
that bitsandbytes quantised. On a GPU dropout keeps a byte mask, on a CPU it does not.
"""

import argparse
from pathlib import Path

from bench.rows import append_rows, environment
from mmpeft_fast.plan.devices import device_named
from mmpeft_fast.plan.request import Request
from mmpeft_fast.plan.step import count_step

MODELS = ("llava-1.5-7b", "llava-1.5-13b")
METHODS = {
    "lora": {"r": 128, "dropout": 0.05}, "adapter": {"bottleneck": 256, "dropout": 0.05}, "ia3": {}, "prefix": {},
    "layernorm-simp": {},
}  # fmt: skip
IMPLEMENTATIONS = {
    "frozen": {"implementation": "frozen"}, "peft": {"implementation": "peft"},
    "peft_bf16": {"implementation": "peft", "fp32_adapters": False},
    "peft_ckpt": {"implementation": "peft", "checkpointing": True}, "fused": {"implementation": "fused"},
    "fused_ckpt": {"implementation": "fused", "checkpointing": True},
    "fused_gate_up": {"implementation": "fused", "recompute": "gate_up"},
    "fused_gate_up+qkv": {"implementation": "fused", "recompute": "gate_up+qkv"},
    "peft_nf4": {"implementation": "peft", "base": "nf4"}, "fused_nf4": {"implementation": "fused", "base": "nf4"},
}  # fmt: skip
_GIB = 2**30


def row_of(model: str, method: str, implementation: str, device_name: str, batch_size: int, seq_len: int) -> dict:
    """One row; with "error" where there is no such combination."""
    device = device_named(device_name)
    common = {
        "op": "memory", "mode": "counted", "model": model, "method": method, "implementation": implementation,
        "counted_for": device_name, "batch_size": batch_size, "seq_len": seq_len, **METHODS[method],
    }  # fmt: skip
    request = Request(
        model=model, method=method, settings=METHODS[method], batch_size=batch_size, seq_len=seq_len,
        **IMPLEMENTATIONS[implementation],
    )  # fmt: skip
    try:
        counts = count_step(request, device.type, gpu_name=device.gpu_name, sdpa=device.sdpa)
    except ValueError as error:
        return {**common, "error": str(error)}
    sizes = {"kept_gib": counts.saved_bytes, "peak_gib": counts.peak_bytes, "weights_gib": counts.weight_bytes}
    return {**common, "baseline": counts.baseline, **{name: size / _GIB for name, size in sizes.items()}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--implementations", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS), metavar="NAME"
    )
    parser.add_argument(
        "--device", default="h200", help="device profile whose kernels are counted (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=700)
    parser.add_argument("--out", type=Path, help="JSON-lines file to append rows to")
    args = parser.parse_args(arguments)
    for model in args.models:
        for method in args.methods:
            for implementation in args.implementations:
                row = row_of(model, method, implementation, args.device, args.batch_size, args.seq_len)
                said = row.get("error") or f"kept {row['kept_gib']:6.2f} GiB, peak {row['peak_gib']:6.2f} GiB"
                print(f"{model:14} {method:15} {implementation:10} {said}", flush=True)
                if args.out:
                    append_rows(args.out, [{**row, **environment()}])


if __name__ == "__main__":
    main()

"""Time and memory of a training step of a LLaMA-like decoder, by method, against HF PEFT and the frozen model.

    python -m bench.step --dtype bf16 --out results/bench/step.jsonl

`frozen` is the stock model's forward and backward to its input embeddings: the speed of light of fine-tuning with a
frozen base. A step here is forward and backward; optimizers are the same for all and left out.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.rows import append_rows, environment, interleaved, quantiles
from mmpeft_fast import METHODS, Method, fuse, make_method, saved_bytes
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.peft_model import RECOMPUTE
from mmpeft_fast.stored.baseline import add_baseline

DENSE = "dense"


def decoder(args) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        vocab_size=args.vocab,
        max_position_embeddings=8192,
    )
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text)
    config._attn_implementation = "sdpa"
    torch.manual_seed(args.seed)
    model = LlavaForConditionalGeneration(config).to(DTYPES[args.dtype])
    if getattr(args, "base", DENSE) == DENSE:
        return model
    from mmpeft_fast.quantised import quantise  # bitsandbytes, which only a packed base needs

    return quantise(model, args.base)


def inputs(args) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(args.seed)
    embeddings = torch.randn(args.batch_size, args.seq_len, args.hidden, generator=generator) * 0.02
    labels = torch.randint(0, args.vocab, (args.batch_size, args.seq_len), generator=generator)
    labels[:, : round(args.seq_len * (1 - args.supervised))] = IGNORE_INDEX
    return {"inputs_embeds": embeddings.to(DTYPES[args.dtype]), "labels": labels}


def settings(args, method: str) -> dict:
    known = vars(make_method(method))
    wanted = {"r": args.r, "alpha": 2 * args.r, "bottleneck": args.r, "dropout": args.dropout}
    return {name: value for name, value in wanted.items() if name in known}


def implementations(args, method: str) -> dict:
    """Models by implementation, trained parameters off their initial zeros; `peft` has the base's dtype throughout."""
    models = {name: baseline(args, make_method(method, **settings(args, method))) for name in ("peft", "fused")}
    fuse(models["fused"], recompute=args.recompute)
    return {"frozen": decoder(args).requires_grad_(False).train(), **models}


def baseline(args, method: Method, *, fp32_adapters: bool | None = None) -> nn.Module:
    """The decoder with HF PEFT's form of a method, trained parameters off their initial zeros; the same at every call.

    fp32_adapters: what was trained stays in float32; as `args` say where None.
    """
    torch.manual_seed(args.seed)
    model, _ = add_baseline(decoder(args), method)
    generator = torch.Generator().manual_seed(args.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator).mul_(0.02).to(parameter.dtype)
    if not (args.fp32_adapters if fp32_adapters is None else fp32_adapters):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[args.dtype])
    return model.train()


def step(model, batch, *, frozen: bool = False):
    for parameter in model.parameters():
        parameter.grad = None
    if frozen:
        batch = {**batch, "inputs_embeds": batch["inputs_embeds"].clone().requires_grad_()}
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss


def bench_method(args, method: str) -> list[dict]:
    models, batch = implementations(args, method), inputs(args)
    functions = {
        name: (lambda model=model, name=name: step(model, batch, frozen=name == "frozen"))
        for name, model in models.items()
    }
    saved = {}
    for name, model in models.items():
        fresh = copy.copy(batch)
        if name == "frozen":
            fresh["inputs_embeds"] = batch["inputs_embeds"].clone().requires_grad_()
        with saved_bytes(model) as counter:
            model(**fresh, use_cache=False)
        saved[name] = counter.bytes / 2**20
    times = {name: quantiles(values) for name, values in interleaved(functions, rounds=args.rounds).items()}
    shape = {name: getattr(args, name) for name in ("hidden", "intermediate", "layers", "heads", "vocab", "seed")}
    common = {
        "op": "step", "mode": "fwd_bwd", "method": method, "dtype": args.dtype, "batch_size": args.batch_size,
        "base": args.base, "recompute": args.recompute, "seq_len": args.seq_len, "supervised": args.supervised,
        **settings(args, method), **shape,
    }  # fmt: skip
    rows = []
    for name, time in times.items():
        ratios = {f"x_{other}": time["p50_ms"] / times[other]["p50_ms"] for other in ("frozen", "peft")}
        rows.append({**common, "implementation": name, **time, **ratios, "saved_mib": saved[name], **environment()})
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["lora"], choices=sorted(METHODS))
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    for name, default in (
        ("hidden", 1024), ("intermediate", 2752), ("layers", 4), ("heads", 8), ("kv-heads", 0), ("vocab", 8192),
        ("batch-size", 2), ("seq-len", 512), ("r", 64), ("rounds", 9), ("seed", 0), ("threads", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--base", default=DENSE, choices=(DENSE, "nf4", "fp4", "int8"), help="format of frozen weights")
    parser.add_argument("--supervised", type=float, default=0.05, help="share of tokens that carry a label")
    parser.add_argument("--recompute", choices=RECOMPUTE[1:], help="what fused layers make again in the backward")
    parser.add_argument(
        "--fp32-adapters", action="store_true", help="PEFT parameters in float32, as HF PEFT makes them"
    )
    parser.add_argument("--out", type=Path, help="JSON-lines file to append rows to")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    for method in args.methods:
        rows = bench_method(args, method)
        for row in rows:
            print(
                f"{method:15} {args.dtype} {row['implementation']:7} {row['p50_ms']:8.1f} ms"
                f"  {row['x_frozen']:5.2f} x frozen  {row['x_peft']:5.2f} x peft  saved {row['saved_mib']:8.1f} MiB",
                flush=True,
            )
        if args.out:
            append_rows(args.out, rows)


if __name__ == "__main__":
    main()

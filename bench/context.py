"""One context, several answers: a training step on one row of documents against one on rows of their own.

    python -m bench.context --questions 5 --context-tokens 600 --answer-tokens 30 --dtype bf16 --json

Every answer follows the same context and carries a few labels, as questions about one image do. `separate`: a row for
each answer, the context in all of them; `shared`: one row, the context once. There HF PEFT takes a dense mask, and the
fused model merges parts (`mmpeft_fast/documents.py`). A step is forward and backward.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import nn

from bench import step
from bench.rows import append_rows, environment, interleaved, quantiles
from mmpeft_fast import Documents, LoRA, fuse, saved_bytes
from mmpeft_fast.documents import with_dense_mask
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.labels import IGNORE_INDEX

IMPLEMENTATIONS = ("peft", "fused")
LAYOUTS = ("separate", "shared")


def batches(args) -> dict[str, dict]:
    """The same samples by layout, as a fused model takes them; embeddings in the model's dtype."""
    generator = torch.Generator().manual_seed(args.seed)
    context, answer, count = args.context_tokens, args.answer_tokens, args.questions
    embeddings = torch.randn(context + count * answer, args.hidden, generator=generator) * 0.02
    embeddings = embeddings.to(DTYPES[args.dtype])
    answers = embeddings[context:].unflatten(0, (count, answer))
    labels = torch.full((count, answer), IGNORE_INDEX)
    labels[:, -args.labels :] = torch.randint(0, args.vocab, (count, args.labels), generator=generator)
    nothing = torch.full((context,), IGNORE_INDEX)
    separate = {
        "inputs_embeds": torch.cat((embeddings[:context].expand(count, -1, -1), answers), dim=1),
        "labels": torch.cat((nothing.expand(count, -1), labels), dim=1),
    }
    documents = Documents((((context, -1), *((answer, 0),) * count),))
    shared = {
        "inputs_embeds": embeddings[None],
        "labels": torch.cat((nothing, labels.flatten()))[None],
        "position_ids": documents.position_ids(),
        "documents": documents,
    }
    return {"separate": separate, "shared": shared}


def models(args) -> dict[str, nn.Module]:
    peft = step.baseline(args, LoRA(r=args.r, alpha=2 * args.r, dropout=args.dropout), fp32_adapters=False)
    return {"peft": peft, "fused": fuse(copy.deepcopy(peft))}


def inputs_of(implementation: str, batch: dict) -> dict:
    """A batch as the implementation takes it: HF PEFT gets a dense mask made beforehand."""
    return batch if implementation == "fused" else with_dense_mask(batch)


def gradient_error(args) -> float:
    """Of the fused model on one row against HF PEFT on rows of their own, in float32 without dropout: the largest
    difference of a gradient over its largest value."""
    exact = argparse.Namespace(**{**vars(args), "dtype": "fp32", "dropout": 0.0})
    made, given = models(exact), batches(exact)
    for name, layout in (("peft", "separate"), ("fused", "shared")):
        step.step(made[name], inputs_of(name, given[layout]))
    pairs = zip(made["fused"].parameters(), made["peft"].parameters(), strict=True)
    return max(
        ((mine.grad - theirs.grad).abs().max() / theirs.grad.abs().max()).item()
        for mine, theirs in pairs
        if theirs.grad is not None
    )


def measure(args) -> dict:
    """Milliseconds (median) and kept MiB by implementation and layout, and the gradients' error."""
    made, given = models(args), batches(args)
    cases = {
        f"{name}_{layout}": (made[name], inputs_of(name, given[layout]))
        for name in IMPLEMENTATIONS
        for layout in LAYOUTS
    }
    found = {}
    for name, (model, batch) in cases.items():
        with saved_bytes(model) as kept:
            model(**batch, use_cache=False)
        found[f"{name}_kept_mib"] = kept.bytes / 2**20
    functions = {name: lambda case=case: step.step(*case) for name, case in cases.items()}
    for name, times in interleaved(functions, rounds=args.rounds).items():
        found |= {f"{name}_ms": quantiles(times)["p50_ms"]}
    return found | {"max_relative_gradient_error": gradient_error(args)}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.context", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    for name, default in (
        ("questions", 5), ("context-tokens", 600), ("answer-tokens", 30), ("labels", 4), ("hidden", 1024),
        ("intermediate", 2752), ("layers", 4), ("heads", 8), ("kv-heads", 0), ("vocab", 8192), ("r", 64), ("rounds", 7),
        ("seed", 0), ("threads", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the table")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append the row to")
    args = parser.parse_args(arguments)
    for name in ("questions", "context_tokens", "labels", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.answer_tokens <= args.labels:
        parser.error(f"--answer-tokens: expected more than the {args.labels} labels, got {args.answer_tokens}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    found = measure(args)
    if args.json:
        print(json.dumps(found))
    else:
        baseline = found["peft_separate_ms"]
        for name in (f"{implementation}_{layout}" for implementation in IMPLEMENTATIONS for layout in LAYOUTS):
            time, kept = found[f"{name}_ms"], found[f"{name}_kept_mib"]
            print(f"{name:15} {time:8.1f} ms  {baseline / time:5.2f}x as fast  kept {kept:8.1f} MiB")
        print(f"largest relative error of a gradient: {found['max_relative_gradient_error']:.1e}")
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "out", "threads")}
        append_rows(
            args.out, [{"op": "context", "mode": "fwd_bwd", "method": "lora", **settings, **found, **environment()}]
        )


if __name__ == "__main__":
    main()

"""Training on questions about images: how samples reach the model, measured through the trainer itself.

    python -m bench.training samples --json      # samples a second, against the recipe of the papers' code
    python -m bench.training packing --json      # time saved by packing beside the share of padding
    python -m bench.training order --base results/study/base/...     # what order by image does to the loss

`samples`: a LLaVA whose tower has CLIP's share of its decoder's size in LLaVA-1.5-7B, on easy-vqa's questions of a few
images. *recipe* is HF PEFT's LoRA on rows padded to the longest, tower and full head at every step; *fused* the same
rows fused; *fused_shared* has each image's questions behind their context and the features of epoch 1. What counts is
a step from epoch 2 on, optimizer and collation included. `packing`: one question an image. `order`: the same tokens in
both orders, three seeds, the loss on held-out questions.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from bench import step
from bench.rows import append_rows, environment, interleaved, quantiles
from mmpeft_fast import LoRA, add_peft, fuse
from mmpeft_fast.data import Collator, Sample, SharedContextCollator, train_tokenizer, without_hints
from mmpeft_fast.data.sets import EASY_VQA_SETS, SETS, load_set
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.models import FAMILIES, load_pretrained
from mmpeft_fast.stored.baseline import add_baseline
from mmpeft_fast.train import TrainConfig, train
from mmpeft_fast.train.vision import cache_vision

PATCH = 14
VOCABULARY = 2048


def processor_of(samples: list[Sample], patches: int) -> LlavaProcessor:
    """LLaVA's processor for square images of patches x patches tokens."""
    side = PATCH * patches
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=train_tokenizer(samples, FAMILIES["llava"].special_tokens, vocab_size=VOCABULARY),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=FAMILIES["llava"].chat_template,
    )


def llava(args, processor: LlavaProcessor) -> nn.Module:
    """A random model. CLIP ViT-L/14 has 4.5 % of the parameters of LLaMA-7B's layers, the tower here as many of its
    decoder's."""
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.intermediate, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads, vocab_size=args.vocab,
        max_position_embeddings=4096,
    )  # fmt: skip
    wide = args.hidden // 4
    depth = max(
        2, round(0.045 * args.layers * (4 * args.hidden + 3 * args.intermediate) * args.hidden / (12 * wide**2))
    )
    vision = CLIPVisionConfig(
        hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=depth, num_attention_heads=wide // 64,
        image_size=PATCH * args.patches, patch_size=PATCH,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_seq_length=args.patches**2,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(args.seed)
    return LlavaForConditionalGeneration(config).to(DTYPES[args.dtype]).requires_grad_(False)


def questions(number_of_images: int, *, each: int | None = None) -> list[Sample]:
    """easy-vqa's training questions on its first images, all or so many of each."""
    of_image: dict[Path, list[Sample]] = {}
    for sample in load_set(EASY_VQA_SETS["easy-vqa"], "", "train"):
        of_image.setdefault(sample.image, []).append(sample)
    return [sample for group in list(of_image.values())[:number_of_images] for sample in group[:each]]


def _adapted(args, processor: LlavaProcessor, *, fused: bool) -> nn.Module:
    method = LoRA(r=args.r, alpha=2 * args.r, dropout=args.dropout)
    model, _ = add_baseline(llava(args, processor), method)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[args.dtype])
    return fuse(model) if fused else model


def _step_seconds(args, samples: list[Sample], processor: LlavaProcessor, implementation: str) -> list[float]:
    """Of each step from the second epoch on."""
    model = _adapted(args, processor, fused=implementation != "recipe")
    is_shared = implementation == "fused_shared"
    with tempfile.TemporaryDirectory() as folder:
        options = {"features": cache_vision(model, folder)} if is_shared else {}
        collator = (SharedContextCollator if is_shared else Collator)(processor, **options)
        config = TrainConfig(
            global_batch_size=args.batch_size, batch_size=args.batch_size, epochs=args.epochs, save_every=0,
            order="by-image" if is_shared else "shuffled", verify=False, seed=args.seed,
        )  # fmt: skip
        ends: list[float] = []
        train(model, config, samples, collator, progress=False, after_step=lambda _: ends.append(time.perf_counter()))
    an_epoch = len(ends) // args.epochs
    return [after - before for before, after in zip(ends[an_epoch - 1 :], ends[an_epoch:])]


def measure_samples(args) -> dict:
    """Samples a second by implementation, and how many times the recipe's."""
    samples = questions(args.images)
    samples = samples[: len(samples) - len(samples) % args.batch_size]
    processor = processor_of(samples, args.patches)
    seconds: dict[str, list[float]] = {name: [] for name in ("recipe", "fused", "fused_shared")}
    for _ in range(args.rounds):
        for name, found in seconds.items():
            found += _step_seconds(args, samples, processor, name)
    rates = {f"{name}_samples_per_s": args.batch_size / statistics.median(found) for name, found in seconds.items()}
    ratio = rates["fused_shared_samples_per_s"] / rates["recipe_samples_per_s"]
    return {"samples": len(samples), "questions_per_image": len(samples) / args.images, **rates, "x_recipe": ratio}


def measure_packing(args) -> dict:
    """Milliseconds of a step on padded and on packed rows, and the shares of tokens and of time that packing saves."""
    if args.set in EASY_VQA_SETS:
        samples = questions(args.batch_size, each=1)
    else:
        samples = load_set(SETS[args.set], args.root, args.split, limit=args.batch_size)
    processor = processor_of(samples, args.patches)
    model = _adapted(args, processor, fused=True).train()
    batches = {
        "padded": Collator(processor)(samples),
        "packed": SharedContextCollator(processor, context="packed")(samples),
    }
    tokens = {name: batch["input_ids"].numel() for name, batch in batches.items()}
    typed = {
        name: {key: value.to(DTYPES[args.dtype]) if key == "pixel_values" else value for key, value in batch.items()}
        for name, batch in batches.items()
    }
    # Padded rows without what spares their padding: what a step costs where every position is computed.
    functions = {name: lambda batch=batch: step.step(model, batch) for name, batch in typed.items()}
    times = {name: quantiles(found)["p50_ms"] for name, found in interleaved(functions, rounds=args.rounds).items()}
    return {
        "set": args.set,
        "samples": len(samples),
        **{f"{name}_ms": each for name, each in times.items()},
        **{f"{name}_tokens": each for name, each in tokens.items()},
        "padding_share": 1 - tokens["packed"] / tokens["padded"],
        "time_saved": 1 - times["packed"] / times["padded"],
    }


@torch.inference_mode()
def _held_out_loss(model: nn.Module, batches: list[dict]) -> float:
    """Mean over the labelled tokens."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        supervised = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
        total += model(**without_hints(batch)).loss.item() * supervised
        count += supervised
    model.train()
    return total / count


def measure_order(args) -> dict:
    """The loss on held-out questions every `--every` steps, by order: mean and standard deviation over three seeds."""
    samples = questions(args.images)
    held_out = load_set(EASY_VQA_SETS["easy-vqa"], "", "test", limit=256)
    curves: dict[str, list[list[float]]] = {"shuffled": [], "by-image": []}
    for seed in range(args.seed, args.seed + 3):
        for order, found in curves.items():
            model, processor = load_pretrained(args.base, dtype=torch.float32)
            model = fuse(add_peft(model, LoRA(r=args.r, alpha=2 * args.r, dropout=args.dropout)))
            plain = Collator(processor)
            batches = [plain(held_out[start : start + 64]) for start in range(0, len(held_out), 64)]
            curve = [_held_out_loss(model, batches)]
            config = TrainConfig(
                global_batch_size=args.batch_size, batch_size=args.batch_size, max_steps=args.steps, save_every=0,
                order=order, seed=seed, learning_rate=args.learning_rate, verify=False,
            )  # fmt: skip

            def note(done: int, model=model, batches=batches, curve=curve) -> None:
                if done % args.every == 0:
                    curve.append(_held_out_loss(model, batches))

            train(model, config, samples, SharedContextCollator(processor), progress=False, after_step=note)
            found.append(curve)
    named = {order.replace("-", "_"): list(zip(*found, strict=True)) for order, found in curves.items()}
    return {
        "steps": list(range(0, args.steps + 1, args.every)),
        **{f"{name}_loss": [statistics.mean(losses) for losses in points] for name, points in named.items()},
        **{f"{name}_sd": [statistics.stdev(losses) for losses in points] for name, points in named.items()},
    }


MEASURES = {"samples": measure_samples, "packing": measure_packing, "order": measure_order}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=sorted(MEASURES))
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    for name, default in (
        ("hidden", 512), ("intermediate", 1376), ("layers", 4), ("heads", 4), ("vocab", 8192), ("patches", 24),
        ("images", 6), ("batch-size", 8), ("epochs", 3), ("rounds", 2), ("r", 16), ("steps", 60), ("every", 10),
        ("seed", 0), ("threads", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--set", default="easy-vqa", choices=sorted([*EASY_VQA_SETS, *SETS]), help="packing: samples")
    parser.add_argument("--root", default="", help="folder of the data sets")
    parser.add_argument("--split", default="train")
    parser.add_argument("--base", help="order: a checkpoint that knows words and pictures, such as a base of the study")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of a line for each figure")
    parser.add_argument("--out", type=Path, help="JSON-lines file to append the row to")
    args = parser.parse_args(arguments)
    for name in ("images", "batch_size", "rounds", "patches", "every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(args, name)}")
    if args.epochs < 2:
        parser.error(f"--epochs: expected at least 2, as the first is not counted, got {args.epochs}")
    if args.what == "order" and args.base is None:
        parser.error("--base: expected a checkpoint, got none")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    found = MEASURES[args.what](args)
    if args.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if args.out:
        used = {
            name: value for name, value in vars(args).items() if name not in ("json", "out", "root", "base", "what")
        }
        row = {"op": f"training_{args.what}", "method": "lora", **used, **found, **environment()}
        append_rows(args.out, [row])


if __name__ == "__main__":
    main()

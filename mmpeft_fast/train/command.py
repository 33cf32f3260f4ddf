"""`mmpeft-fast train`: fine-tune a multimodal LLM on conversations, from the command line."""

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from mmpeft_fast import add_peft, fuse, save_peft, study_method
from mmpeft_fast.atomic import exclusive, write_text
from mmpeft_fast.data import (
    CONTEXTS,
    Collator,
    FeatureStore,
    Sample,
    SharedContextCollator,
    check_images,
    easy_vqa_conversations,
    load_conversations,
    train_tokenizer,
)
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.fields import shown
from mmpeft_fast.methods import METHODS, make_method
from mmpeft_fast.models import FAMILIES, base_model, family_of, load_pretrained, tiny_model, tiny_names, tiny_processor
from mmpeft_fast.peft_model import RECOMPUTE
from mmpeft_fast.stored.baseline import add_baseline
from mmpeft_fast.stored.checkpoint import check_replaceable
from mmpeft_fast.train.config import TrainConfig
from mmpeft_fast.train.evaluate import evaluate_accuracy
from mmpeft_fast.train.trainer import TrainResult, check_output, check_tracker, seed_everything, train
from mmpeft_fast.train.vision import cache_vision, why_no_vision_cache

EASY_VQA = "easy-vqa"
RESULT, ADAPTER = "result.json", "adapter"
TINY_MODELS = tiny_names()
_DTYPES = ("bf16", "fp32")
# Fewer lengths, fewer graphs; half of it is what a sample gains on the mean.
_GRAPH_MULTIPLE = 64

_EPILOG = f"""\
data: LLaVA's conversation JSON (a list) or .jsonl, one entry per sample:
  {{"id": "1", "image": "a.png", "conversations": [
     {{"from": "human", "value": "<image>\\nWhat is it?"}}, {{"from": "gpt", "value": "A cat."}}]}}

output: train_log.jsonl (a row per step), checkpoint-<step>/ (trainable.safetensors and what exact resume needs),
  {ADAPTER}/ (in HF PEFT's format) and {RESULT} at the end. Ctrl-C, SIGTERM and SIGHUP save after the current step and
  exit with 130; go on with --resume, which takes the run's own settings, model and data only.

examples:
  mmpeft-fast train --model tiny-llava --method lora --set r=16 --set alpha=32 --data easy-vqa --limit 2000 \\
      --global-batch-size 16 --batch-size 8 --learning-rate 1e-3 --output runs/tiny
  mmpeft-fast train --model path/to/llava-1.5-7b-hf --method lora --train-connector \\
      --data train.json --images images --output runs/lora --tracker tensorboard
  mmpeft-fast train --model path/to/llava-1.5-7b-hf --method lora --train-connector \\
      --data train.json --images images --output runs/lora --tracker tensorboard --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG

    group = parser.add_argument_group("model and method")
    group.add_argument(
        "--model",
        required=True,
        help=f"checkpoint folder, hub name, or a model built on the spot: {', '.join(TINY_MODELS)}",
    )
    group.add_argument("--method", required=True, help=f"one of {', '.join(METHODS)}")
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the method, such as r=64 or dropout=0.0; may be repeated",
    )
    group.add_argument("--train-connector", action="store_true", help="train the connector too; layernorm always does")
    group.add_argument(
        "--implementation",
        choices=("fused", "peft"),
        default="fused",
        help="this package's fused ops, or HF PEFT to compare with (default: %(default)s)",
    )
    group.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of all weights (default: %(default)s)")
    group.add_argument(
        "--fp32-adapters",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the method's added parameters in fp32; with --no-.. they are in --dtype too (default: fp32)",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", required=True, metavar="FILE", help=f"conversation JSON, or {EASY_VQA} for the built-in set"
    )
    group.add_argument("--images", metavar="DIR", help="what the data's image paths are relative to, if there are any")
    group.add_argument(
        "--images-anywhere", action="store_true", help="take image paths that are absolute or lead out of the folder"
    )
    group.add_argument("--limit", type=int, metavar="N", help=f"only the first N samples ({EASY_VQA}: a random N)")
    group.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="longest sample (default: %(default)s)"
    )
    group.add_argument(
        "--loss",
        choices=("publisher", "answers"),
        default="publisher",
        help="what counts: as the model's publisher fine-tunes (Qwen-VL-Chat: the turns' markers too, samples cut "
        "wherever --max-length falls), or answers alone; the same for other families (default: %(default)s)",
    )
    group.add_argument(
        "--context",
        choices=(*CONTEXTS, "padded"),
        help="how samples lie in a batch: behind one another, what those of one image begin with alike once (shared); "
        "behind one another, each whole (packed); in rows of their own (default: shared where the fused model can and "
        "no CUDA graphs are recorded, else padded)",
    )
    group.add_argument("--padding-side", choices=("right", "left"), help="of --context padded (default: right)")
    group.add_argument(
        "--pad-to-multiple-of",
        type=int,
        metavar="N",
        help=f"pad batches to a length that N divides ({_GRAPH_MULTIPLE} with CUDA graphs, else 1)",
    )
    group.add_argument("--num-workers", type=int, metavar="N", help="processes that load images (default: none)")
    group.add_argument(
        "--vision-cache",
        type=_folder,
        metavar="DIR",
        help="keep there what the frozen tower and connector make of each image, for this and other runs; off: compute "
        "it at every step (default: off)",
    )
    group.add_argument(
        "--vision-cache-gib",
        type=float,
        default=100.0,
        metavar="X",
        help="most of --vision-cache; what was used longest ago goes first (default: %(default)s)",
    )
    group.add_argument(
        "--eval-data", metavar="FILE", help=f"measure exact-match accuracy at the end; {EASY_VQA}: test split"
    )
    group.add_argument("--eval-images", metavar="DIR", help="image folder of --eval-data")
    group.add_argument("--eval-limit", type=int, metavar="N", help="only N samples of --eval-data")

    group = parser.add_argument_group("optimization", "Defaults are the study's for the method and the model family.")
    group.add_argument("--learning-rate", type=float, metavar="X")
    group.add_argument("--connector-learning-rate", type=float, metavar="X")
    group.add_argument("--weight-decay", type=float, metavar="X")
    group.add_argument("--warmup-ratio", type=float, metavar="X", help="share of the steps with rising learning rate")
    group.add_argument("--max-grad-norm", type=float, metavar="X")
    group.add_argument("--epochs", type=float, metavar="X")
    group.add_argument("--max-steps", type=int, metavar="N", help="optimizer steps, in place of --epochs")
    group.add_argument("--global-batch-size", type=int, metavar="N", help="samples per optimizer step (128)")
    group.add_argument("--batch-size", type=int, metavar="N", help="samples per forward on one device (16)")
    group.add_argument(
        "--tokens-per-batch",
        type=int,
        metavar="N",
        help="tokens per forward on one device, padding included, in place of --batch-size: the samples of a step are "
        "packed into few batches, which changes neither the step's loss nor its gradients",
    )
    group.add_argument(
        "--order",
        choices=("shuffled", "by-image"),
        help="of samples: each for itself, or those of one image together, for --context shared (default: shuffled)",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", default=None)
    group.add_argument(
        "--recompute",
        choices=RECOMPUTE[1:],
        help="what fused layers make again in the backward in place of keeping it: gate and up are nearly half of what "
        "is kept, q, k and v most of the rest; no number changes",
    )
    group.add_argument("--seed", type=int, metavar="N")

    group = parser.add_argument_group("run")
    group.add_argument("--output", required=True, type=_folder, metavar="DIR", help="where the log and checkpoints go")
    group.add_argument("--resume", action="store_true", help="continue from the latest checkpoint in --output")
    group.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints, 0: only the last (500)")
    group.add_argument("--keep-checkpoints", type=int, metavar="N", help="how many to keep (2)")
    group.add_argument("--log-every", type=int, metavar="N", help="steps between log rows (1)")
    group.add_argument("--tracker", metavar="NAME", help="tensorboard, wandb, .. or none (none)")
    group.add_argument(
        "--no-verify", action="store_false", dest="verify", help="do not compare the fused model with itself unfused"
    )
    group.add_argument("--cpu", action="store_true", help="do not use an accelerator")
    group.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="replay the fused decoder layers of shapes that come again (default: where there is an NVIDIA GPU)",
    )
    group.add_argument("--no-progress", action="store_true", help="no progress bar")


def _folder(text: str) -> Path:
    if not text.strip():  # of a shell's variable that is not set
        raise argparse.ArgumentTypeError("expected a folder's name, got an empty text")
    return Path(text)


def run(args: argparse.Namespace) -> int:
    """Train as asked; returns the exit code. Raises ValueError for bad input, before anything is written."""
    overrides = {name: getattr(args, name) for name in TrainConfig.__dataclass_fields__ if hasattr(args, name)}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    settings = parse_settings(args.set)
    make_method(args.method, **settings)  # checked before the slow part begins, like the configuration
    config = TrainConfig.for_study(args.method, "", **overrides)
    check_output(args.output, resume=args.resume)
    _check_results(args.output, resume=args.resume)
    check_tracker(config.tracker, args.output)
    samples = _load(args, "", "train", config.seed)
    eval_samples = []
    if args.eval_data is not None:
        eval_samples = _load(args, "eval-", "test", config.seed)

    model, processor = _load_model(args.model, DTYPES[args.dtype], samples, config.seed)
    config = TrainConfig.for_study(args.method, family_of(model).name, **overrides)
    context, multiple_of = _context(args, model, processor), args.pad_to_multiple_of
    if multiple_of is None:
        multiple_of = _GRAPH_MULTIPLE if _records_graphs(args) and context == "padded" else 1
    options = {"max_length": args.max_length, "multiple_of": multiple_of, "loss": args.loss}
    padded = Collator(processor, padding_side=args.padding_side or "right", **options)
    collator = padded if context == "padded" else SharedContextCollator(processor, context=context, **options)
    collator.check([*samples, *eval_samples])
    seed_everything(config.seed)  # the method's initial values
    method = study_method(model, args.method, **settings)
    model, implementation = _add_method(model, method, args)
    if config.gradient_checkpointing and args.method == "prefix" and implementation.startswith("HF PEFT"):
        raise ValueError(
            "--gradient-checkpointing: expected --implementation fused with --method prefix; "
            "HF PEFT keeps the prefix in the key/value cache, which checkpointing turns off"
        )
    collator.features = padded.features = _feature_store(args, model)
    is_main = PartialState(cpu=args.cpu).is_main_process
    if is_main:
        print(_summary(model, args, implementation, len(samples)), flush=True)
    try:
        result = train(
            model,
            config,
            samples,
            collator,
            output=args.output,
            resume=args.resume,
            progress=not args.no_progress,
            cpu=args.cpu,
        )
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result.interrupted and is_main:
        print(f"interrupted after step {result.steps}, saved {result.checkpoint}; go on with --resume", file=sys.stderr)
    if result.interrupted:
        return 130
    if is_main:
        accuracy = evaluate_accuracy(model, padded, eval_samples) if eval_samples else None
        with exclusive(args.output):
            save_peft(model, args.output / ADAPTER)
            write_text(args.output / RESULT, json.dumps(_outcome(result, accuracy), indent=2) + "\n")
        print(_conclusion(result, accuracy))
    return 0


def _check_results(output: Path, *, resume: bool) -> None:
    """Raise ValueError where something stands in the place of what a run writes at its end."""
    adapter, result = output / ADAPTER, output / RESULT
    if os.path.lexists(result) and not result.is_file():
        raise ValueError(f"{result}: expected a file or nothing, something else is in its place")
    if os.path.lexists(adapter):
        check_replaceable(adapter, "save_peft")
        if not resume:
            raise ValueError(f"{adapter}: expected a new folder for the adapter, there is one already")


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["r=64", "targets=q,v"]` as `{"r": 64, "targets": ("q", "v")}`. Raises ValueError for a setting without `=`."""
    parsed = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not (equals and name and text):
            raise ValueError(f"--set: expected NAME=VALUE, got {setting!r}")
        parsed[name.strip()] = tuple(map(parse_value, text.split(","))) if "," in text else parse_value(text)
    return parsed


def parse_value(text: str) -> int | float | bool | str | None:
    """A number, true, false or null as JSON has them, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text.strip()
    except (RecursionError, ValueError) as error:
        raise ValueError(f"expected a number, true, false, null or a word, got {shown(text)}") from error


def _load(args: argparse.Namespace, option: str, split: str, seed: int) -> list[Sample]:
    """Samples of `--<option>data`, with every image's header read."""
    data, images, limit = (getattr(args, f"{option.replace('-', '_')}{name}") for name in ("data", "images", "limit"))
    if data != EASY_VQA:
        samples = load_conversations(data, images, limit=limit, images_anywhere=args.images_anywhere)
        check_images(samples)
        return samples
    if images is not None:
        raise ValueError(f"--{option}images: expected none, as {EASY_VQA} brings its own, got {images}")
    with tempfile.TemporaryDirectory() as folder:
        return load_conversations(*easy_vqa_conversations(folder, split, limit=limit, seed=seed))


def _load_model(name: str, dtype: torch.dtype, samples: list[Sample], seed: int) -> tuple[nn.Module, Any]:
    if name not in TINY_MODELS:
        return load_pretrained(name, dtype=dtype)
    family = TINY_MODELS[name]
    tokenizer = train_tokenizer(samples, FAMILIES[family].special_tokens)
    return tiny_model(family, tokenizer, seed=seed).to(dtype), tiny_processor(family, tokenizer)


def _add_method(model: nn.Module, method: Any, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """Add the method's parameters in the dtype asked for; returns the model and whose code runs it."""
    own = {id(parameter) for parameter in model.parameters()}
    if args.implementation == "fused":
        model, implementation = add_peft(model, method, train_connector=args.train_connector), "fused"
    else:
        model, implementation = add_baseline(model, method, train_connector=args.train_connector)
    if not args.fp32_adapters:
        for parameter in model.parameters():
            if id(parameter) not in own:
                parameter.data = parameter.data.to(DTYPES[args.dtype])
    if args.implementation == "fused":
        model = fuse(model, cuda_graphs=_records_graphs(args), recompute=args.recompute)
    elif args.recompute is not None:
        raise ValueError(f"--recompute: expected --implementation fused, got {args.implementation}")
    return model, implementation


def _context(args: argparse.Namespace, model: nn.Module, processor: Any) -> str:
    """How samples lie in a batch, where nobody has said it: in one row, where the fused model can do that and no graphs
    of repeated shapes are recorded."""
    if args.context is not None:
        if args.context != "padded" and args.padding_side is not None:
            raise ValueError(f"--padding-side: expected --context padded, got {args.context}")
        return args.context
    may_be = args.implementation == "fused" and args.padding_side is None and not _records_graphs(args)
    is_able = family_of(model).why_not_packed is None and family_of(model).full_attention(base_model(model))
    return "shared" if may_be and is_able else "padded"


def _feature_store(args: argparse.Namespace, model: nn.Module) -> FeatureStore | None:
    """Where features of images are kept; none where nobody asks for it, or where they do not stay what they are."""
    if not 0 < args.vision_cache_gib < math.inf:
        raise ValueError(f"--vision-cache-gib: expected a number above 0, got {args.vision_cache_gib}")
    if args.vision_cache in (None, Path("off")):
        return None
    reason = why_no_vision_cache(model)
    if reason is not None:
        print(f"--vision-cache: off, as {reason}", file=sys.stderr)
        return None
    model.to(PartialState(cpu=args.cpu).device)  # whose features they are
    return cache_vision(model, args.vision_cache, most_bytes=max(1, int(args.vision_cache_gib * 2**30)))


def _records_graphs(args: argparse.Namespace) -> bool:
    may_be = args.implementation == "fused" and not args.cpu and torch.cuda.is_available()
    if args.cuda_graphs and not may_be:
        found = (
            "--cpu" if args.cpu else f"--implementation {args.implementation}" if torch.cuda.is_available() else "none"
        )
        raise ValueError(f"--cuda-graphs: expected an NVIDIA GPU and the fused implementation, got {found}")
    return may_be if args.cuda_graphs is None else args.cuda_graphs


def _summary(model: nn.Module, args: argparse.Namespace, implementation: str, num_samples: int) -> str:
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{args.model}, {args.method} ({implementation}), {args.dtype}: {trainable:,} of {total:,} parameters "
        f"trainable ({trainable / total:.3%}), {num_samples:,} samples"
    )


def _outcome(result: TrainResult, accuracy: float | None) -> dict[str, Any]:
    outcome = {name: value for name, value in asdict(result).items() if name not in ("losses", "interrupted")}
    last = result.losses[-1] if result.losses else None
    return {**outcome, "checkpoint": result.checkpoint.name, "loss_last": last, "accuracy": accuracy}


def _conclusion(result: TrainResult, accuracy: float | None) -> str:
    parts = [f"step {result.steps}"]
    if result.losses:
        parts.append(f"loss {result.losses[-1]:.4f}")
    if accuracy is not None:
        parts.append(f"accuracy {accuracy:.1%}")
    return f"done: {', '.join(parts)}; saved {result.checkpoint}"

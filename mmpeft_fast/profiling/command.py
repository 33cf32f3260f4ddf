"""`mmpeft-fast profile`: options, the runs, the folder and what is printed."""

import argparse
import json
import os
import sys
from pathlib import Path

from mmpeft_fast.plan.command import add_contexts

EPILOG = """\
examples:
  mmpeft-fast profile --model tiny-llava --method lora
  mmpeft-fast profile --model llava-1.5-7b --layers 2 --method lora --set r=128 --what layer --dtype bf16
  mmpeft-fast profile --model qwen2.5-vl-7b --method ia3 --device cuda --implementation peft fused --output profile

Weights are random and nothing is downloaded. Each implementation runs forward and backward, and AdamW in a step: in
turn without tracing for the times, then traced for what they consist of. The folder gets report.html, profile.json,
and a trace of each implementation for chrome://tracing or https://ui.perfetto.dev.
"""
_TINY_SEQ_LEN, _SEQ_LEN = 128, 1024
_TINY_IMAGE_SIZE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mmpeft-fast profile`."""
    parser.epilog = EPILOG
    subject = parser.add_argument_group("what runs")
    subject.add_argument(
        "--model", default="tiny-llava", metavar="NAME|PATH",
        help="tiny-llava and the like, a size such as llava-1.5-7b, or a local configuration (default: tiny-llava)",
    )  # fmt: skip
    subject.add_argument("--layers", type=int, metavar="N", help="decoder layers (default: the model's)")
    subject.add_argument("--method", default="lora", help="lora, ia3, adapter, prefix, layernorm, layernorm-simp")
    subject.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the method; may be repeated"
    )
    subject.add_argument(
        "--what", default="step",
        help="step, layer (the first of the decoder) or op (its q, k, v behind their norm) (default: step)",
    )  # fmt: skip
    subject.add_argument(
        "--implementation", nargs="+", default=["frozen", "peft", "fused"], metavar="I",
        help="of frozen, peft, fused (default: all, side by side)",
    )  # fmt: skip
    subject.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples (default: 1)")
    subject.add_argument(
        "--seq-len", type=int, metavar="N", help="tokens a sample, its images' included (default: 1024, tiny: 128)"
    )
    add_contexts(subject)
    subject.add_argument("--images", type=int, metavar="N", help="images a sample (default: 1, of text models 0)")
    subject.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="side of an image, where the model takes any (default: 448)"
    )
    subject.add_argument(
        "--supervised-fraction", type=float, default=0.05, metavar="F", help="tokens with a label (default: 0.05)"
    )
    subject.add_argument("--base", default="dense", help="storage of frozen weights: dense, nf4, fp4 or int8")
    subject.add_argument("--dtype", help="bf16, fp16 or fp32, of the base model (default: fp32 on a CPU, else bf16)")
    subject.add_argument(
        "--fp32-adapters", action=argparse.BooleanOptionalAction, default=True,
        help="added parameters in float32, else in --dtype (default: float32)",
    )  # fmt: skip

    device = parser.add_argument_group("where")
    device.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto, cuda where there is one)")
    device.add_argument(
        "--device-profile", metavar="NAME|FILE",
        help="for the roofline: a profile of `mmpeft-fast plan`, measure, or none "
        "(default: the GPU's own where it is known, else measure, half a minute)",
    )  # fmt: skip
    device.add_argument("--steps", type=int, default=5, metavar="N", help="timed runs of each (default: 5)")

    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, default=Path("profile"), metavar="DIR", help="folder (default: profile)")
    output.add_argument("--json", action="store_true", help="print profile.json instead of tables")


def run(args: argparse.Namespace) -> int:
    """Profiles as asked; returns 0. Raises ValueError for bad input before anything runs."""
    # torch 2.13's tracer would write a line at every start and stop; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from mmpeft_fast.profiling.folder import PROFILE_NAME, REPORT_NAME, check_folder, write_profile
    from mmpeft_fast.profiling.run import run_profile
    from mmpeft_fast.profiling.text import comparison_text

    check_folder(args.output)
    config = _config(args)
    measured, device = run_profile(config, lambda line: print(f"profile: {line}", file=sys.stderr, flush=True))
    request = _request_json(config)
    write_profile(args.output, measured, request, device)
    if args.json:
        print(json.dumps(json.loads((args.output / PROFILE_NAME).read_text(encoding="utf-8")), indent=2))
    else:
        print(comparison_text(measured, request))
        print(f"\nreport   {args.output / REPORT_NAME}\ntraces   {args.output}/trace_*.json")
    return 0


def _config(args: argparse.Namespace):
    import torch

    from mmpeft_fast.models import FAMILIES
    from mmpeft_fast.plan.request import Request
    from mmpeft_fast.profiling.run import ProfileConfig
    from mmpeft_fast.profiling.subjects import TINY_MODELS
    from mmpeft_fast.train.command import parse_settings

    if args.device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda, got {args.device!r}")
    tiny = args.model in TINY_MODELS
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    images = args.images
    if images is None and tiny:
        images = FAMILIES[TINY_MODELS[args.model]].usual_images
    dtype = args.dtype or ("bf16" if device == "cuda" else "fp32")
    request = Request(
        model=args.model, method=args.method, settings=parse_settings(args.set), batch_size=args.batch_size,
        seq_len=(_TINY_SEQ_LEN if tiny else _SEQ_LEN) if args.seq_len is None else args.seq_len, images=images,
        image_size=_TINY_IMAGE_SIZE if tiny and args.image_size is None else args.image_size,
        supervised_fraction=args.supervised_fraction, dtype=dtype, base=args.base, fp32_adapters=args.fp32_adapters,
        questions_per_image=args.questions_per_image, question_tokens=args.question_tokens, context=args.context,
    )  # fmt: skip
    return ProfileConfig(
        request=request, implementations=tuple(args.implementation), what=args.what, layers=args.layers,
        steps=args.steps, device=device, device_profile=args.device_profile,
    )  # fmt: skip


def _request_json(config) -> dict:
    """What was asked for, and on what it ran."""
    import dataclasses

    from mmpeft_fast.doctor import device_name

    request = dataclasses.asdict(config.request)
    request["size"] = config.request.size
    del request["implementation"]
    return {
        "what": config.what, "layers": config.layers, "steps": config.steps, "device": config.device,
        "device_name": device_name(config.device), "threads": _threads(config.device), **request,
    }  # fmt: skip


def _threads(device: str) -> int | None:
    import torch

    return torch.get_num_threads() if device == "cpu" else None

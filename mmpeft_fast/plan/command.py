"""`mmpeft-fast plan`: options, and what is printed or written."""

import argparse
import json
import warnings
from pathlib import Path

EPILOG = """\
examples:
  mmpeft-fast plan --model llava-1.5-7b --method lora --r 128 --batch-size 4 --device h100
  mmpeft-fast plan --model qwen2.5-vl-7b --method ia3 --implementation peft --checkpointing --device a100-40 --json
  mmpeft-fast plan --model llava-1.5-7b --method lora --sweep batch_size=1,2,4,8 --sweep implementation=peft,fused \\
      --csv plan.csv --plot plan.html
  mmpeft-fast plan --calibrate mine.json --device cuda     measure this machine, then: --device mine.json
  mmpeft-fast plan papers                                   the papers' tables beside our counts

Nothing is downloaded and no device is needed: the real model code runs at full size on tensors without memory.
"""
_PLAIN = (
    "model",
    "method",
    "implementation",
    "batch_size",
    "seq_len",
    "questions_per_image",
    "question_tokens",
    "context",
    "images",
    "image_size",
    "dtype",
    "base",
    "recompute",
    "optimizer",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mmpeft-fast plan`."""
    parser.epilog = EPILOG
    parser.add_argument("what", nargs="?", choices=("step", "papers"), default="step", help="default: one step")

    step = parser.add_argument_group("the step")
    step.add_argument("--model", metavar="SIZE|PATH", help="such as llava-1.5-7b, or a local configuration")
    step.add_argument("--method", default="lora", help="lora, ia3, adapter, prefix, layernorm, layernorm-simp")
    step.add_argument("--r", type=int, metavar="N", help="LoRA's rank; the same as --set r=N")
    step.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the method; may be repeated"
    )
    step.add_argument("--implementation", default="fused", help="fused, peft or frozen (default: fused)")
    step.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples (default: 1)")
    step.add_argument(
        "--seq-len", type=int, default=1024, metavar="N", help="tokens a sample, its images' included (default: 1024)"
    )
    add_contexts(step)
    step.add_argument("--images", type=int, metavar="N", help="images a sample (default: 1, of text models 0)")
    step.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="side of an image, where the model takes any (default: 448)"
    )
    step.add_argument(
        "--supervised-fraction", type=float, default=0.05, metavar="F", help="tokens with a label (default: 0.05)"
    )
    step.add_argument("--dtype", default="bf16", help="bf16, fp16 or fp32, of the base model (default: bf16)")
    step.add_argument(
        "--base", default="dense", help="storage of frozen weights: dense, nf4, fp4 or int8 (default: dense)"
    )
    step.add_argument("--checkpointing", action="store_true", help="activation checkpointing of the decoder's layers")
    step.add_argument(
        "--recompute", metavar="PARTS", help="gate_up, qkv or gate_up+qkv: what fused layers make again in the backward"
    )
    for part in ("connector", "embeddings", "head"):
        step.add_argument(f"--train-{part}", action="store_true", help=f"train the {part} too")
    step.add_argument(
        "--fp32-adapters", action=argparse.BooleanOptionalAction, default=True,
        help="added parameters in float32, else in --dtype (default: float32)",
    )  # fmt: skip

    step.add_argument(
        "--optimizer", default="foreach", help="AdamW as torch chooses on a GPU (foreach), or fused (default: foreach)"
    )

    device = parser.add_argument_group("the device")
    device.add_argument(
        "--device", default="h100", metavar="NAME|FILE",
        help="a100-40, a100-80, h100, b200, l40s, rtx-4090, cpu: from data sheets; h200: as measured, on a slow host; "
        "h200-usual-host: on one 2.5 times as fast; or a profile's file (default: h100)",
    )  # fmt: skip
    device.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="measure --device cuda or cpu here and write its profile"
    )

    output = parser.add_argument_group("output")
    output.add_argument(
        "--sweep", action="append", default=[], metavar="NAME=V,V,..",
        help="a plan for each value of an option of the step, of the method, or of device; several make a grid",
    )  # fmt: skip
    output.add_argument("--csv", type=Path, metavar="FILE", help="write a sweep's rows")
    output.add_argument("--plot", type=Path, metavar="FILE", help="write a sweep's charts as .svg or .html")
    output.add_argument("--json", action="store_true", help="print JSON instead of text")
    output.add_argument(
        "--answers", action="store_true",
        help="also say which batch and length still fit and what to change first; takes some ten further plans",
    )  # fmt: skip


def add_contexts(step: argparse._ArgumentGroup) -> None:
    """Adds what says how many samples have an image in common."""
    step.add_argument(
        "--questions-per-image",
        type=int,
        default=1,
        metavar="N",
        help="N samples for each of --batch-size (default: 1)",
    )
    step.add_argument(
        "--question-tokens", type=int, default=64, metavar="N",
        help="then: of --seq-len, tokens behind what they have in common (default: 64)",
    )  # fmt: skip
    step.add_argument(
        "--context", default="shared", help="then: fused computes it once (shared) or not (separate; default: shared)"
    )


def run(args: argparse.Namespace) -> int:
    """Plans as asked and prints; returns 0. Raises ValueError for bad input."""
    if args.calibrate is not None:
        _calibrate(args)
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries warn of concerns training, and nothing trains here
        if args.what == "papers":
            _papers()
        elif args.sweep:
            _sweep(args)
        else:
            _plan(args)
    return 0


def _papers() -> None:
    from mmpeft_fast.plan.papers import papers_text

    print(papers_text())


def _request(args: argparse.Namespace):
    """The step that the options mean."""
    from mmpeft_fast.plan.request import TRAINABLE_PARTS, Request
    from mmpeft_fast.train.command import parse_settings

    if args.model is None:
        raise ValueError("--model: expected a size such as llava-1.5-7b or a local configuration, got none")
    settings = parse_settings(args.set) | ({} if args.r is None else {"r": args.r})
    return Request(
        **{name: getattr(args, name) for name in (*_PLAIN, "supervised_fraction", "checkpointing", "fp32_adapters")},
        settings=settings,
        train=tuple(part for part in TRAINABLE_PARTS if getattr(args, f"train_{part}")),
    )


def _calibrate(args: argparse.Namespace) -> None:
    from mmpeft_fast.plan.calibrate import calibrate
    from mmpeft_fast.plan.devices import write_device

    if args.device not in ("cuda", "cpu"):
        raise ValueError(f"--calibrate: expected --device cuda or cpu, got {args.device!r}")
    if not args.calibrate.resolve().parent.is_dir():
        raise ValueError(f"--calibrate: expected a file in an existing folder, got {args.calibrate}")
    device = calibrate(args.device, args.calibrate.stem)
    write_device(device, args.calibrate)
    best = {dtype: max(rate for _, rate in points) / 1e12 for dtype, points in device.gemm.items()}
    print(f"{args.calibrate}: {', '.join(f'{dtype} {rate:.2f} TFLOP/s' for dtype, rate in best.items())}, "
          f"{device.bytes_per_s / 1e9:.1f} GB/s, {device.launch_s * 1e6:.1f} us a launch")  # fmt: skip


def _plan(args: argparse.Namespace) -> None:
    from mmpeft_fast.plan.advice import changes, largest_batch, largest_length
    from mmpeft_fast.plan.devices import device_named
    from mmpeft_fast.plan.prediction import plan
    from mmpeft_fast.plan.report import answers_text, plan_text

    if args.csv or args.plot:
        raise ValueError("--csv, --plot: expected a --sweep to write, got none")
    planned = plan(_request(args), device_named(args.device))
    if args.json:
        print(json.dumps(planned.as_json(), indent=2))
        return
    print(plan_text(planned), flush=True)
    if not args.answers:
        print("\n--answers: the largest batch and length that fit, and what to change first")
    else:
        print("\n" + answers_text(planned, largest_batch(planned), largest_length(planned), changes(planned)))


def _sweep(args: argparse.Namespace) -> None:
    from mmpeft_fast.atomic import write_text
    from mmpeft_fast.plan.charts import sweep_html, sweep_svg
    from mmpeft_fast.plan.report import sweep_text
    from mmpeft_fast.plan.sweep import as_csv, axis, rows_of, swept
    from mmpeft_fast.train.command import parse_value

    for option, path in (("--csv", args.csv), ("--plot", args.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{option}: expected a file in an existing folder, got {path}")
    if args.plot is not None and args.plot.suffix not in (".svg", ".html"):
        raise ValueError(f"--plot: expected a file that ends in .svg or .html, got {args.plot}")
    request = _request(args)
    axes = [axis(text, parse_value) for text in args.sweep]
    plans = swept(request, args.device, axes)
    rows, names = rows_of(plans), [name for name, _ in axes]
    text = sweep_text(names, rows)
    if args.csv is not None:
        write_text(args.csv, as_csv(rows))
    if args.plot is not None:
        devices = {planned.device.name: planned.device.memory_bytes for _, planned in plans}
        title = f"{request.model}, {request.method}, {', '.join(devices)}"
        memory = next(iter(devices.values())) if len(devices) == 1 else None
        svg = sweep_svg(rows, names, title=title, memory_bytes=memory)
        write_text(args.plot, svg if args.plot.suffix == ".svg" else sweep_html(svg, title, text))
    print(json.dumps(rows, indent=2) if args.json else text)

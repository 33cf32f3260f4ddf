"""Times of single ops at the sizes of 7B decoders, forward and backward, implementations in turn.

The four linear calls of a layer with LoRA, IA3 and the Adapter; attention with a prefix; norm; head and cross-entropy.
`frozen` is what remains without PEFT; `peft` and `peft_bf16` are HF PEFT's formulas with float32 and bf16 adapters;
`torch` and `triton` are the fused op by provider. Rows come twice: mode "eager" (launch costs included) and
mode "graph" (replayed as a CUDA graph). Saved bytes include the weights, which all of them keep.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import registry
from bench.gpu import peers, tuned
from bench.gpu.judge import DTYPES
from bench.gpu.shapes import DIMS, LinearCall, linear_calls
from bench.gpu.timing import captured, interleaved_ms, num_launches, on_provider
from bench.gpu.worker import device_errors, one_line
from bench.rows import quantiles
from mmpeft_fast import saved_bytes
from mmpeft_fast.ops.fused_linear import fused_linear
from mmpeft_fast.ops.prologue import prologue_ref
from mmpeft_fast.ops.segments import Branch, Segment

_SCALING, _EPS = 2.0, 1e-6
_SECONDS_A_CASE = 1.5
_LENGTH = 1024
# The op of `dispatch.OPS` that a case of bench.registry measures, beside the linear calls.
_REGISTRY = {"prefix_attention": "attention", "norm": "rms_norm", "loss": "linear_cross_entropy"}


class Timed(NamedTuple):
    """forwards by implementation; wanted: what each is differentiated by."""

    forwards: dict[str, Callable[[], tuple[Tensor, ...]]]
    wanted: dict[str, list[Tensor]]


def items(providers: list[str], device: str, tuned_folder: str | None) -> list[dict]:
    """Keyword arguments of `run`, the most telling first."""
    common = {"providers": providers, "device": device, "tuned_folder": tuned_folder}
    sizes = [("llama-7b", 4096), ("qwen2.5-7b", 4096), ("llama-7b", 1024), ("qwen2.5-7b", 8192)]
    found = []
    for dims, tokens in sizes:
        shape = {"dims": dims, "tokens": tokens, **common}
        for method, r, dropout in (("lora", 16, 0.0), ("lora", 128, 0.05)):
            for call in linear_calls(DIMS[dims]):
                found.append({"case": call, "method": method, "r": r, "dropout": dropout, **shape})
        found += [{"case": case, "method": "", "r": 0, "dropout": 0.0, **shape} for case in _REGISTRY]
    for dims, tokens in sizes[:2]:
        shape = {"dims": dims, "tokens": tokens, **common}
        found.append({"case": "down", "method": "ia3", "r": 0, "dropout": 0.0, **shape})
        found += [{"case": c, "method": "adapter", "r": 256, "dropout": 0.05, **shape} for c in ("gate_up", "down")]
    return found


def _branches(call: LinearCall, method: str, r: int, dropout: float, dtype, device) -> list[tuple[Tensor, Tensor]]:
    """(down, up) of every segment, all of them rows of one buffer each, as `fuse` stacks them."""
    if method not in ("lora", "adapter"):
        return []
    options = {"dtype": dtype, "device": device}
    num_outs, num_segments = call.num_outs, len(call.num_outs)
    # The Adapter adds to the GEMM's input on gate and up, and to its output on down.
    inside = method == "adapter" and call.prologue == "rms_norm"
    outside = method == "adapter" and not inside
    width = num_outs[0] if outside else call.width
    ups = [call.width] * num_segments if inside else list(num_outs)
    downs = torch.randn(num_segments * r, width, **options) * width**-0.5
    return list(zip(downs.split(r), (torch.randn(sum(ups), r, **options) * r**-0.5).split(ups), strict=True))


def linear_case(
    call: LinearCall, method: str, r: int, dropout: float, tokens: int, providers: list[str], dtype, device: str
) -> Timed:
    """A linear call of a decoder layer with a method on it, by every implementation."""
    torch.manual_seed(0)
    options = {"dtype": dtype, "device": device}
    num_inputs = 2 if call.prologue == "swiglu" else 1
    x = tuple(
        part.requires_grad_() for part in torch.randn(tokens, num_inputs * call.width, **options).split(call.width, 1)
    )
    weights = (torch.randn(sum(call.num_outs), call.width, **options) * call.width**-0.5).split(list(call.num_outs))
    biases = [torch.randn(num_out, **options) if call.bias else None for num_out in call.num_outs]
    residual = torch.randn(tokens, call.num_outs[0], **options).requires_grad_() if call.residual else None
    gain = torch.rand(call.width, **options) + 0.5 if call.prologue == "rms_norm" else None
    in_scale = torch.ones(call.width, device=device).requires_grad_() if method == "ia3" else None
    inputs = [*x, *([residual] if call.residual else [])]

    def trained(branches):
        return [tensor.requires_grad_() for pair in branches for tensor in pair]

    def stock(function) -> Callable[[], tuple[Tensor, ...]]:
        """A stock layer around `function(h, i)`, the i-th linear's output."""

        def forward():
            h = prologue_ref(call.prologue, x, gain, _EPS, None)
            outputs = [function(h, i) for i in range(len(weights))]
            return tuple(y if residual is None else y + residual for y in outputs)

        return forward

    forwards = {"frozen": stock(lambda h, i: F.linear(h, weights[i], biases[i]))}
    wanted = {"frozen": inputs}
    narrow = _branches(call, method, r, dropout, dtype, device)
    wide = [(down.float(), up.float()) for down, up in narrow]
    if method == "lora":
        for name, branches in (("peft", wide), ("peft_bf16", narrow)):
            forwards[name] = stock(
                lambda h, i, branches=branches: _peft(h, weights[i], biases[i], *branches[i], dropout)
            )
            wanted[name] = [*inputs, *trained(branches)]
        for style in peers.STYLES:
            kept = 0.0 if style == "unsloth_style" else dropout
            forwards[style] = stock(
                lambda h, i, style=style, kept=kept: peers.linear(
                    style, h, weights[i], biases[i], *narrow[i], scaling=_SCALING, dropout=kept
                )
            )
            wanted[style] = wanted["peft_bf16"]
    activation = "tanh" if method == "adapter" else "identity"
    position = "parallel" if method == "lora" else "pre" if call.prologue == "rms_norm" else "post"
    segments = [
        Segment(weight, bias, (Branch(*narrow[i], _SCALING, activation, position, dropout),) if narrow else ())
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True))
    ]

    def fused():
        y = fused_linear(
            x if num_inputs == 2 else x[0], segments, prologue=call.prologue, gain=gain, eps=_EPS, in_scale=in_scale,
            residual=residual,
        )  # fmt: skip
        return y if isinstance(y, tuple) else (y,)

    for name in providers:
        forwards[name] = fused
        wanted[name] = [*inputs, *trained(narrow), *([] if in_scale is None else [in_scale])]
    return Timed(forwards, wanted)


def _peft(h: Tensor, weight: Tensor, bias, down: Tensor, up: Tensor, dropout: float) -> Tensor:
    """HF PEFT's forward of one linear layer."""
    result = F.linear(h, weight, bias)
    branch = F.linear(F.linear(F.dropout(h.to(down.dtype), dropout), down), up) * _SCALING
    return (result + branch).to(result.dtype)


def registry_case(case: str, dims: str, tokens: int, providers: list[str], dtype, device: str) -> Timed:
    """A case of `bench.registry` at a decoder's sizes; its fused op by every provider."""
    sizes = DIMS[dims]
    shape = registry.Shape(
        tokens=tokens, length=min(_LENGTH, tokens), hidden=sizes.hidden, intermediate=sizes.intermediate,
        heads=sizes.heads, vocab=sizes.vocab,
    )  # fmt: skip
    made = registry.make_case(case, shape, dtype=dtype, device=device)
    fused = dict.fromkeys(providers, "fused")
    names = {"frozen": "frozen", "eager": "eager", **fused}
    return Timed(
        {name: made.forwards[source] for name, source in names.items()},
        {name: made.wanted[source] for name, source in names.items()},
    )


def _stepper(timed: Timed, name: str) -> Callable[[], object]:
    """Forward and backward of one implementation."""
    upstream: list[Tensor] = []

    def step():
        with on_provider(name):
            outputs = timed.forwards[name]()
            if not upstream:
                upstream.extend(torch.randn_like(y) for y in outputs)
            return torch.autograd.grad(outputs, timed.wanted[name], upstream)

    return step


def run(
    case: str, dims: str, tokens: int, method: str, r: int, dropout: float, providers: list[str], device: str,
    tuned_folder: str | None, dtype: str = "bf16", rounds: int = 15,
) -> Iterator[dict]:  # fmt: skip
    """Rows of one case, all implementations in turn."""
    with tuned.installed(None if tuned_folder is None else Path(tuned_folder)):
        calls = linear_calls(DIMS[dims])
        if case in calls:
            timed = linear_case(calls[case], method, r, dropout, tokens, providers, DTYPES[dtype], device)
        else:
            timed = registry_case(case, dims, tokens, providers, DTYPES[dtype], device)
        op = _REGISTRY.get(case, "fused_linear")
        label = " ".join([case, method, *([f"r{r}", f"p{dropout}"] if r else []), dims, f"M{tokens}"])
        common = {"op": op, "case": label, "dtype": dtype, "tokens": tokens, "rank": r, "dropout": dropout}
        steps = {name: _stepper(timed, name) for name in timed.forwards}
        extras, working = {}, {}
        # The profiler takes longer than the rest: launches do not depend on the sizes.
        counted = device == "cuda" and dims == "llama-7b" and tokens == 4096
        for name, step in steps.items():
            try:
                step()
                extras[name] = _extras(timed, name, step, counted)
            except device_errors() as error:
                yield {**common, "implementation": name, "error": one_line(error)}
            else:
                working[name] = step
        yield from _rows(
            working, extras, {**common, "mode": "eager"}, _gemm_flops(calls.get(case), tokens), device, rounds
        )
        if device != "cuda":
            return
        graphs = {}
        for name, step in working.items():
            try:
                graphs[name] = captured(step)
            except device_errors() as error:
                yield {**common, "mode": "graph", "implementation": name, "error": one_line(error)}
        yield from _rows(graphs, {}, {**common, "mode": "graph"}, _gemm_flops(calls.get(case), tokens), device, rounds)


def _extras(timed: Timed, name: str, step, counted: bool) -> dict:
    """Bytes kept for the backward, and launches of forward and backward where they are to be counted."""
    with on_provider(name), saved_bytes() as saved:
        outputs = timed.forwards[name]()
    del outputs
    return {"saved_mib": saved.bytes / 2**20, "launches": num_launches(step) if counted else None}


def _gemm_flops(call: LinearCall | None, tokens: int) -> int | None:
    """Of the frozen GEMMs, forward and dx."""
    return None if call is None else 4 * tokens * call.width * sum(call.num_outs)


def _rows(steps: dict, extras: dict, common: dict, flops: int | None, device: str, rounds: int) -> Iterator[dict]:
    times = interleaved_ms(steps, device=device, rounds=rounds, seconds=_SECONDS_A_CASE)
    medians = {name: quantiles(values)["p50_ms"] for name, values in times.items()}
    for name, values in times.items():
        row = {**common, "implementation": name, **quantiles(values), **extras.get(name, {})}
        row |= {f"x_{other}": medians[name] / medians[other] for other in ("frozen", "peft") if other in medians}
        yield row if flops is None else {**row, "tflops": flops / medians[name] / 1e9}

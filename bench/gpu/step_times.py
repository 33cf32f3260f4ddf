"""Times, memory and launches of one decoder layer and of whole training steps of 7B models, by implementation."""

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.gpu import models, tuned
from bench.gpu.judge import DTYPES
from bench.gpu.machine import clocks
from bench.gpu.timing import captured, interleaved_ms, num_launches, on_provider, synchronize
from bench.gpu.worker import device_errors, one_line
from bench.rows import quantiles
from mmpeft_fast import saved_bytes
from mmpeft_fast.models import FAMILIES, base_model

# In the order in which they matter, should time run out.
STEP_ORDER = (
    "frozen", "triton", "torch", "peft", "peft_bf16", "default", "cuda", "unsloth_style", "lorafusion_style", "compile",
)  # fmt: skip
# No further step is timed after these.
_SECONDS_A_STEP = 12.0


def step_items(implementations: list[str], device: str, tuned_folder: str | None) -> list[dict]:
    """Keyword arguments of `run_step`. The models with fewer layers come last: they are for what did not fit."""
    return [
        {"setting": setting.name, "implementation": name, "device": device, "tuned_folder": tuned_folder}
        for setting in models.SETTINGS
        for name in STEP_ORDER
        if name in implementations
    ]


def layer_items(implementations: list[str], device: str, tuned_folder: str | None) -> list[dict]:
    """Keyword arguments of `run_layer`; without `compile`, whose compile could take the section's time."""
    names = [name for name in STEP_ORDER if name in implementations and name != "compile"]
    common = {"implementations": names, "device": device}
    settings = (models.SETTINGS[0], models.SETTINGS[2])
    return [{"setting": setting.name, "tuned_folder": tuned_folder, **common} for setting in settings]


def setting_named(name: str) -> models.Setting:
    return next(setting for setting in models.SETTINGS if setting.name == name)


def _memory(device: str) -> dict[str, float]:
    if device != "cuda":
        return {}
    stats = {"peak_allocated_mib": torch.cuda.max_memory_allocated, "peak_reserved_mib": torch.cuda.max_memory_reserved}
    return {name: function() / 2**20 for name, function in stats.items()}


def _collect(device: str) -> None:
    """Gives back what the last implementation held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_step(
    setting: str | models.Setting, implementation: str, device: str, tuned_folder: str | None, dtype: str = "bf16",
    rounds: int = 8,
) -> Iterator[dict]:  # fmt: skip
    """One row of one implementation: whole steps, one after another on an otherwise idle GPU."""
    setting = setting if isinstance(setting, models.Setting) else setting_named(setting)
    common = {"op": "step", "mode": "step", "implementation": implementation, "dtype": dtype, **asdict(setting)}
    _collect(device)
    started = time.monotonic()
    with tuned.installed(None if tuned_folder is None else Path(tuned_folder)):
        model = models.build(setting, DTYPES[dtype], device)
        config, dense = model.config, _dense_parameters(model, setting)
        model = models.implement(model, setting, implementation)
        inputs = models.batch(setting, config, DTYPES[dtype], device)
        step = models.step(model, inputs, implementation)
        loss = step().item()
        built_s = time.monotonic() - started
        times = interleaved_ms({"step": step}, device=device, rounds=rounds, warmup=2, seconds=_SECONDS_A_STEP)["step"]
        step()  # the clocks of a GPU at work: it still runs when this returns
        seen, memory = clocks() if device == "cuda" else {}, _memory(device)
        row = {**common, **quantiles(times), "first_loss": loss, "built_s": built_s, **memory, "clocks": seen}
        yield {
            **row,
            **_throughput(row["p50_ms"] / 1e3, inputs, dense),
            **_counts(model, inputs, step, implementation, device),
        }


def _dense_parameters(model: nn.Module, setting: models.Setting) -> int:
    """Of the stock decoder's linear layers and the head: 4 FLOPs a token each, forward and dx."""
    decoder = FAMILIES[setting.family].decoder_of(model)
    return sum(module.weight.numel() for module in [*decoder.modules(), model.lm_head] if type(module) is nn.Linear)


def _throughput(seconds: float, inputs: dict, dense: int) -> dict[str, float]:
    """Tokens by kind; dense_tflops: were every token run densely through the frozen decoder and head."""
    tokens, supervised = inputs["input_ids"].numel(), int((inputs["labels"] != -100).sum())
    return {
        "tokens_s": tokens / seconds, "supervised_tokens_s": supervised / seconds,
        "dense_tflops": 4 * tokens * dense / seconds / 1e12,
    }  # fmt: skip


def _counts(model: nn.Module, inputs: dict, step, implementation: str, device: str) -> dict:
    """Bytes kept for the backward, launches of a step."""
    found: dict = {}
    try:
        with on_provider(implementation), saved_bytes(model) as saved:
            loss = model(**inputs, use_cache=False).loss
        del loss
        found["saved_mib"] = saved.bytes / 2**20
        found["launches"] = num_launches(step) if device == "cuda" else None
    except device_errors() as error:
        found["count_error"] = one_line(error)
    return found


def run_layer(
    setting: str | models.Setting, implementations: list[str], device: str, tuned_folder: str | None,
    dtype: str = "bf16", rounds: int = 15,
) -> Iterator[dict]:  # fmt: skip
    """Rows of the first decoder layer of a two-layer model: forward and backward, implementations in turn."""
    setting = setting if isinstance(setting, models.Setting) else setting_named(setting)
    setting = replace(setting, num_layers=2)
    common = {"op": "layer", "dtype": dtype, **asdict(setting)}
    steps, extras, layers = {}, {}, []
    with tuned.installed(None if tuned_folder is None else Path(tuned_folder)):
        for name in implementations:
            try:
                step, saved_mib = _layer_step(setting, name, DTYPES[dtype], device, layers)
                step()
                extras[name] = {"saved_mib": saved_mib(), "launches": num_launches(step) if device == "cuda" else None}
            except device_errors() as error:
                yield {**common, "mode": "eager", "implementation": name, "error": one_line(error)}
            else:
                steps[name] = step
        yield from _layer_rows(steps, extras, {**common, "mode": "eager"}, device, rounds)
        graphs = {}
        for name, step in steps.items() if device == "cuda" else ():
            try:
                graphs[name] = captured(step)
            except device_errors() as error:
                yield {**common, "mode": "graph", "implementation": name, "error": one_line(error)}
        if graphs:
            yield from _layer_rows(graphs, {}, {**common, "mode": "graph"}, device, rounds)


def _layer_step(setting, name: str, dtype: torch.dtype, device: str, kept: list):
    """(forward and backward of the layer, bytes it keeps); only the layer and the rotary embedding stay alive."""
    family = FAMILIES[setting.family]
    model = models.implement(models.build(setting, dtype, device), setting, name)
    decoder = family.decoder_of(base_model(model))
    layer, hidden = decoder.layers[0], decoder.config.hidden_size
    # A fused prefix or a PEFT wrapper must outlive its layer.
    kept.append(layer)
    x = torch.randn(setting.batch_size, setting.length, hidden, dtype=dtype, device=device, requires_grad=True)
    positions = torch.arange(setting.length, device=device)[None]
    if setting.family != "llava":
        positions = positions.expand(3, 1, -1)  # mRoPE: time, height, width
    with torch.no_grad():
        angles = tuple(part.detach() for part in decoder.rotary_emb(x, positions))
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    upstream = torch.randn_like(x)

    def forward() -> Tensor:
        with on_provider(name):
            y = layer(x, position_embeddings=angles, attention_mask=None, position_ids=positions)
        return y[0] if isinstance(y, tuple) else y

    def step():
        y = forward()
        with on_provider(name):
            return torch.autograd.grad(y, wanted, upstream)

    def saved_mib() -> float:
        with saved_bytes(layer) as saved:
            y = forward()
        del y
        return saved.bytes / 2**20

    del model, decoder
    synchronize(device)
    return step, saved_mib


def _layer_rows(steps: dict, extras: dict, common: dict, device: str, rounds: int) -> Iterator[dict]:
    times = interleaved_ms(steps, device=device, rounds=rounds)
    medians = {name: quantiles(values)["p50_ms"] for name, values in times.items()}
    for name, values in times.items():
        ratios = {f"x_{other}": medians[name] / medians[other] for other in ("frozen", "peft") if other in medians}
        yield {**common, "implementation": name, **quantiles(values), **ratios, **extras.get(name, {})}


def with_ratios(rows: list[dict]) -> list[dict]:
    """Step rows with x_frozen and x_peft, from the rows of the same setting."""
    found = {(row["name"], row["implementation"]): row["p50_ms"] for row in rows if "p50_ms" in row}
    return [
        row
        | {
            f"x_{other}": row["p50_ms"] / found[row["name"], other]
            for other in ("frozen", "peft")
            if "p50_ms" in row and (row["name"], other) in found
        }
        for row in rows
    ]

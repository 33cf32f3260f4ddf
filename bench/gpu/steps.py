"""Whole training steps of randomly initialised 7B models, every one in a process of its own: time, host time, memory.

p50_ms is what a training loop sees, steps that follow one another; gpu_ms the sum of a step's kernels; host_ms what the
host needs to issue a step into an empty queue (it waits where about a thousand launches are pending).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.gpu import real_peers, tuned, tuning
from bench.gpu.machine import clocks
from bench.gpu.profile import profiled, table_of_kernels
from bench.gpu.shapes import SETTINGS, Setting
from bench.gpu.timing import device_of, on_provider, timed
from mmpeft_fast import LoRA, add_peft, fuse, saved_bytes
from mmpeft_fast.dtypes import DTYPES
from mmpeft_fast.labels import IGNORE_INDEX
from mmpeft_fast.models import FAMILIES
from mmpeft_fast.ops.providers import PROVIDERS, why_not_installed
from mmpeft_fast.stored.baseline import add_baseline

_SCALING = 2.0
FUSED = (*PROVIDERS, "default", "graphs")
# No further step is timed after these.
_SECONDS_A_STEP = 12.0


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(setting: Setting, dtype: torch.dtype, device: str) -> nn.Module:
    """The stock model, initialised by transformers in `dtype` on the device: no second copy anywhere."""
    family = FAMILIES[setting.family]
    if setting.size == "tiny":
        ids = {text: i for i, text in enumerate(("<pad>", "<s>", "</s>", *family.special_tokens))}
        config = family.tiny_config(64, ids.__getitem__)
    else:
        config = family.sizes[setting.size]()
    if setting.num_layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = setting.num_layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: setting.num_layers]
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with _default_dtype(dtype), torch.device(device):
        return family.model_class(config)


def batch(setting: Setting, config, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random tokens, an image a sample where there is one, no padding."""
    torch.manual_seed(1)
    size = (setting.batch_size, setting.length)
    vocab = config.get_text_config().vocab_size
    image = getattr(config, "image_token_index", None) or getattr(config, "image_token_id", None) or -1
    ids = torch.randint(vocab // 2, vocab, size, device=device)
    ids = torch.where(ids == image, vocab // 2 - 1, ids)
    labels = ids.clone()
    labels[:, : round(setting.length * (1 - setting.supervised))] = IGNORE_INDEX
    inputs = {"input_ids": ids, "labels": labels}
    count = setting.num_image_tokens
    if not count:
        return inputs
    vision = config.vision_config
    ids[:, 0] = getattr(config, "vision_start_token_id", None) or vocab // 2
    ids[:, 1 : 1 + count] = image
    if setting.family == "llava":
        side = vision.image_size
        return {**inputs, "pixel_values": torch.randn(setting.batch_size, 3, side, side, dtype=dtype, device=device)}
    height = round((4 * count) ** 0.5)  # four patches a token
    patches, width = setting.batch_size * 4 * count, 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        **inputs,
        "pixel_values": torch.randn(patches, width, dtype=dtype, device=device),
        "image_grid_thw": torch.tensor([[1, height, 4 * count // height]] * setting.batch_size, device=device),
        "mm_token_type_ids": (ids == image).int(),
    }


def implement(model: nn.Module, setting: Setting, implementation: str) -> nn.Module:
    """The stock model as `implementation` trains it; changed in place.

    frozen: nothing is trained, the backward goes to the input embeddings. peft: HF PEFT, float32 adapters; peft_bf16:
    adapters in the model's dtype; liger: that, on Liger's classes; unsloth: `real_peers`. A provider's name: fused with
    float32 adapters and forced to that provider; default: as `fuse` chooses; graphs: that, replayed as CUDA graphs.
    """
    method = LoRA(r=setting.r, alpha=_SCALING * setting.r, dropout=setting.dropout)
    dtype = next(model.parameters()).dtype
    if implementation == "frozen":
        model.requires_grad_(False)
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())
    elif implementation in FUSED:
        if implementation != "default" and why_not_installed(implementation) is not None:  # asking loads the extension
            raise RuntimeError(f"{implementation} is not installed: {why_not_installed(implementation)}")
        model = fuse(add_peft(model, method), cuda_graphs=implementation == "graphs")
    elif implementation == "unsloth":
        model = real_peers.unsloth_model(model, setting)
    else:
        model, _ = add_baseline(model, method)
        for parameter in model.parameters():
            if parameter.requires_grad and implementation != "peft":
                parameter.data = parameter.data.to(dtype)
    return model.train()


def training_step(model: nn.Module, inputs: dict, implementation: str, capturable: bool = False) -> Callable:
    """One training step: forward, backward, and AdamW where something is trained; gives the loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"fused": True, "capturable": capturable} if inputs["input_ids"].device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(trained, lr=1e-5, **options) if trained else None
    inputs = {**inputs, "use_cache": False}
    autocast = implementation == "unsloth"  # as its trainer does
    if implementation in FUSED:
        # Known on the host, as the package's collator knows it: the step need not wait for the GPU.
        inputs["supervised_capacity"] = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum(1).max())

    def one() -> Tensor:
        with on_provider(implementation), torch.autocast(inputs["input_ids"].device.type, enabled=autocast):
            loss = model(**inputs).loss
        with on_provider(implementation):
            loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return one


def run_step(
    setting: str, implementation: str, dtype: str, device: str, tables: str | None = None, rounds: int = 8,
    profile: dict | None = None, label: str | None = None,
) -> Iterator[dict]:  # fmt: skip
    """One row of one implementation; then, with `profile` (the machine's rates), a row for each kind of kernel.

    tables: folder of the tables that dispatch reads, the committed ones where None. label: added to the row.
    """
    common = {"mode": "step", "implementation": implementation, "dtype": dtype, **asdict(SETTINGS[setting])}
    common |= {"label": label} if label else {}
    started = time.monotonic()
    with tuned.installed(None if tables is None else Path(tables)):
        stock = build(SETTINGS[setting], DTYPES[dtype], device)
        config, dense = stock.config, _dense_parameters(stock, SETTINGS[setting])
        model = implement(stock, SETTINGS[setting], implementation)
        inputs = batch(SETTINGS[setting], config, DTYPES[dtype], device)
        step = training_step(model, inputs, implementation)
        loss = step().item()
        built_s = time.monotonic() - started
        clock = device_of(device)
        step()
        _reset_peak(device)
        times = timed({"step": step}, clock, rounds=rounds, warmup=1, seconds=_SECONDS_A_STEP, head_start=False)
        row = {**common, **times["step"].row(), "first_loss": loss, "built_s": built_s, **_peak(device)}
        step()  # the clocks of a GPU at work: it still runs when this returns
        row["clocks"] = clocks() if device == "cuda" else {}
        row |= _issue(step, clock) | _throughput(row["p50_ms"] / 1e3, inputs, dense)
        # Known from here on, whatever happens to the counts.
        yield row
        with on_provider(implementation), saved_bytes(model) as saved:
            kept = model(**inputs, use_cache=False).loss
        del kept
        counted = profiled(step, device)
        host = {"us_a_launch": 1e3 * row["host_ms"] / counted.launches} if counted.launches else {}
        more = {"saved_mib": saved.bytes / 2**20, "launches": counted.launches, "gpu_ms": counted.total_ms, **host}
        yield {**common, "mode": "counts", **more}
        if profile is not None:
            for line in table_of_kernels(step, counted, profile):
                yield {**common, "mode": "profile", **line}


def compiled(**arguments) -> Iterator[dict]:
    """Compiles, by running it, a whole step (arguments of `run_step`) or one kernel (of `tuning.compile_call`)."""
    if "setting" in arguments:
        yield next(run_step(**arguments))
    else:
        yield from tuning.compile_call(**arguments)


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> dict[str, float]:
    if device != "cuda":
        return {}
    stats = {"peak_allocated_mib": torch.cuda.max_memory_allocated, "peak_reserved_mib": torch.cuda.max_memory_reserved}
    return {name: function() / 2**20 for name, function in stats.items()}


def _issue(step: Callable, clock) -> dict[str, float]:
    """The least host time of a few steps, each issued into an empty queue."""
    found = []
    for _ in range(3):
        clock.synchronize()
        start = clock.now()
        step()
        found.append((clock.now() - start) * 1e3)
    clock.synchronize()
    return {"host_ms": min(found)}


def _dense_parameters(model: nn.Module, setting: Setting) -> int:
    """Of the stock decoder's linear layers and the head: 4 FLOPs a token each, forward and dx."""
    decoder = FAMILIES[setting.family].decoder_of(model)
    return sum(module.weight.numel() for module in [*decoder.modules(), model.lm_head] if type(module) is nn.Linear)


def _throughput(seconds: float, inputs: dict, dense: int) -> dict[str, float]:
    """Tokens by kind; dense_tflops: were every token run densely through the frozen decoder and head."""
    tokens, supervised = inputs["input_ids"].numel(), int((inputs["labels"] != IGNORE_INDEX).sum())
    return {
        "tokens_s": tokens / seconds, "supervised_tokens_s": supervised / seconds,
        "dense_tflops": 4 * tokens * dense / seconds / 1e12,
    }  # fmt: skip


def run_graph(setting: str, implementation: str, dtype: str, device: str) -> Iterator[dict]:
    """One row of a step replayed as a CUDA graph: the same kernels without their launch costs.

    Everything runs on one side stream from the first step on, so that the graph's gradients are accumulated where they
    were made. A capture that fails raises, and the process ends with it.
    """
    common = {"mode": "graph", "implementation": implementation, "dtype": dtype, **asdict(SETTINGS[setting])}
    clock = device_of(device)
    stream = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(stream):  # does nothing with None
        model = build(SETTINGS[setting], DTYPES[dtype], device)
        config = model.config
        model = implement(model, SETTINGS[setting], implementation)
        inputs = batch(SETTINGS[setting], config, DTYPES[dtype], device)
        step = training_step(model, inputs, implementation, capturable=True)
        for _ in range(3):
            step()
        clock.synchronize()
        replay = step
        if stream is not None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step()
            replay = graph.replay
        yield {**common, **timed({"graph": replay}, clock, seconds=_SECONDS_A_STEP)["graph"].row()}

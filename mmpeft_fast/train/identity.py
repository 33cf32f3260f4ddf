"""What a run is: every setting that changes a number in it, so that a checkpoint is continued by the same run only.

It is read off the objects themselves (dataclass fields, configurations, tensors), so that a new setting is part of it
without a line here; what may change between a run and its continuation is the exception and is listed.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmpeft_fast.data import Collator, Sample, data_digest
from mmpeft_fast.fusion import fuse_report
from mmpeft_fast.models import base_model
from mmpeft_fast.peft_model import is_fused
from mmpeft_fast.train.config import TrainConfig

# Fields of TrainConfig that change no number.
FREE_FIELDS = {"shard", "num_workers", "log_every", "save_every", "keep_checkpoints", "tracker", "verify"}
# Entries of a model's or HF PEFT's configuration that say where it came from, or what it does when nothing is trained.
_ORIGIN = {
    *("_name_or_path", "transformers_version", "architectures", "use_cache", "auto_map"),
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode"),
    *("dtype", "torch_dtype"),  # what the weights were stored in; theirs now is read from themselves
}
# Attributes of modules that change no number: what a library has said, and recomputing, which gives the same bits.
_UNCOUNTED = {"training", "gradient_checkpointing", "warnings_issued", "is_tail"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 20  # values of a block of `weights_digest`: temporaries of 16 MiB


def run_identity(
    model: nn.Module,
    config: TrainConfig,
    dataset: Sequence[Sample],
    collator: Collator,
    *,
    num_processes: int,
    num_steps: int,
    device_type: str,
) -> dict[str, Any]:
    """Everything that changes a number of the run, as JSON has it.

    The data count by `data_digest`, the frozen weights by `weights_digest`, tokenizer and processor by a digest of
    their files' content; everything else stands there as it is, so that a difference can be named.
    """
    identity = {name: value for name, value in asdict(config).items() if name not in FREE_FIELDS}
    # Of all processes together: a run goes on in another number of them that cuts its steps into the same passes.
    identity["batch_size"] = config.batch_size * num_processes
    identity |= {"num_samples": len(dataset), "steps": num_steps, "device": device_type}
    identity["method"] = _method(model)
    identity["model"] = _model(model)
    identity["collator"] = getattr(collator, "settings", None)
    identity["data"] = data_digest(dataset[index] for index in range(len(dataset)))
    return json.loads(json.dumps(identity, default=_plain))


def differences(saved: object, now: Mapping[str, Any]) -> list[str]:
    """One "name was (now is)" for each setting in which two identities differ."""
    before, after, unsaid = dict(_flat(saved)), dict(_flat(now)), object()
    return [
        f"{name} {before.get(name, 'not said')!r} (now {after.get(name, 'not said')!r})"
        for name in dict.fromkeys([*after, *before])
        if before.get(name, unsaid) != after.get(name, unsaid)
    ]


def weights_digest(model: nn.Module) -> str:
    """Digest of the frozen weights: names, shapes, dtypes, and of every 2^20 values one sum of their bits times odd
    numbers that differ by position, modulo 2^64.

    Every bit is read, where it lies: at the speed of memory instead of a cryptographic hash's, and one changed value
    always shows. It tells apart weights that were confused, not weights that somebody made to collide.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if not isinstance(tensor, Tensor) or tensor.requires_grad:
            continue
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            digest.update(json.dumps(_sums(tensor.detach())).encode())
    return digest.hexdigest()


def modules_digest(model: nn.Module) -> str:
    """Digest of what modules compute apart from the weights: of each its name, class, numbers and truths among its
    public attributes (epsilons, scales, rates of dropout), and the buffers that no checkpoint holds (rotary
    frequencies); of a fused model also what is not fused."""
    digest = hashlib.sha256(repr(sorted(fuse_report(model).kept) if is_fused(model) else []).encode())
    for name, module in model.named_modules():
        kind = type(module)  # a fused one has its own name
        counted = {key: value for key, value in vars(module).items() if key[0] != "_" and key not in _UNCOUNTED}
        numbers = sorted((key, repr(value)) for key, value in counted.items() if _is_number(value))
        digest.update(repr([name, kind.__module__, kind.__name__, numbers]).encode())
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(key)
            if buffer is not None and not buffer.is_meta:
                digest.update(repr([key, list(buffer.shape), buffer.dtype, _sums(buffer.detach())]).encode())
    return digest.hexdigest()


def _is_number(value: object) -> bool:
    """Numbers and truths, and collections of nothing else."""
    if isinstance(value, Mapping):
        return all(map(_is_number, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_number, value))
    return isinstance(value, bool | int | float)


def _sums(tensor: Tensor) -> list[int]:
    bits = tensor.reshape(-1).view(_INTEGERS[tensor.element_size()])
    odd = 2 * torch.arange(min(_BLOCK, bits.numel()), device=bits.device) + 1
    sums = [(block.long() * odd[: block.numel()]).sum() for block in bits.split(_BLOCK)]
    return torch.stack(sums).tolist() if bits.numel() else []


def _model(model: nn.Module) -> dict[str, Any]:
    base = base_model(model)
    # Recorded layers take other kernels of the libraries: other roundings.
    has_graphs = is_fused(model) and fuse_report(model).graphs is not None
    return {
        **({"cuda_graphs": True} if has_graphs else {}),
        "class": type(base).__name__,
        "fused": is_fused(model),
        "config": _without_origin(base.config.to_dict()),
        "attention": base.config._attn_implementation,
        **_attention_of_parts(base),
        "dtype": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}),
        "trained_values": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "weights": weights_digest(model),
        "modules": modules_digest(model),
    }


def _attention_of_parts(base: nn.Module) -> dict[str, Any]:
    """The attention of a tower or decoder, where it is another one than the model's."""
    parts = {name: part for name, part in base.named_modules() if isinstance(part, PreTrainedModel)}
    chosen = {name: part.config._attn_implementation for name, part in parts.items()}
    return {f"attention of {name}": how for name, how in chosen.items() if how != base.config._attn_implementation}


def _method(model: nn.Module) -> dict[str, Any] | None:
    if isinstance(model, PeftModel):
        return {name: _without_origin(config.to_dict()) for name, config in model.peft_config.items()}
    method = getattr(model, "peft_method", None)
    return None if method is None else {"name": type(method).__name__, **asdict(method)}


def _without_origin(settings: object) -> object:
    if isinstance(settings, Mapping):
        return {name: _without_origin(value) for name, value in settings.items() if name not in _ORIGIN}
    return settings


def _plain(value: object) -> object:
    """What JSON has no word for."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return str(value) if isinstance(value, torch.dtype | Enum | Path) else type(value).__name__


def _flat(settings: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(settings, Mapping) and settings:
        for name, value in settings.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, settings

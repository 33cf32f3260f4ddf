"""Federated averaging of adapters (McMahan et al. 2017, algorithm 1; FS-LLM, Kuang et al. 2023), folder by folder."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from mmpeft_fast.atomic import new_folder, recover
from mmpeft_fast.fields import above, check_value, shown
from mmpeft_fast.stored.checkpoint import check_replaceable, read_adapter

__all__ = ["average_peft"]

# What may differ: who wrote a folder, and where the base model lay there.
_INCIDENTAL = ("peft_version", "inference_mode", "auto_mapping", "task_type", "revision", "base_model_name_or_path")
_WHO = "average"


def average_peft(
    folders: Sequence[str | Path], output: str | Path, *, weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Writes the weighted mean of adapters that were trained apart, tensor by tensor, whole or not at all.

    Of a product, as LoRA's U D, the mean of each factor is taken, as FedAvg does; the mean of the products is another
    matrix. Sums are formed in float64 and rounded once, to the first folder's dtypes.

    Args:
        folders: two or more adapters of one method with the same settings and tensors, of base models of one name (the
            last part of it): written by `save_peft` or by HF PEFT.
        output: new, empty, or with nothing but an earlier adapter, which it replaces.
        weights: a positive number a folder, such as its number of samples; None: all the same.

    Returns:
        The tensors that were written, on the CPU.

    Raises:
        ValueError: fewer than two folders, weights that do not fit, the first difference between two folders, a tensor
            with nan or infinity, or other files in `output`.
    """
    paths, output = [recover(Path(folder)) for folder in folders], recover(Path(output))
    if len(paths) < 2:
        raise ValueError(f"{_WHO}: expected two folders or more, got {len(paths)}")
    weights = [1.0] * len(paths) if weights is None else list(weights)
    if len(weights) != len(paths):
        raise ValueError(f"{_WHO}: expected {len(paths)} weights, one a folder, got {len(weights)}")
    for weight in weights:
        check_value(f"{_WHO}: a weight", weight, Annotated[float, above(0)])
    if output.exists():
        check_replaceable(output, _WHO)
    total = math.fsum(weights)

    config, first, metadata = read_adapter(paths[0], _WHO)
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in first.items()}
    for path, weight in zip(paths, weights, strict=True):
        other, tensors, marks = read_adapter(path, _WHO)
        _check_same(paths[0], path, config, other, metadata, marks)
        _check_tensors(paths[0], path, first, tensors)
        for name, tensor in tensors.items():
            sums[name] += (weight / total) * tensor.double()
    mean = {name: each.to(first[name].dtype).contiguous() for name, each in sums.items()}
    text = (paths[0] / CONFIG_NAME).read_bytes()
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_folder(output) as temporary:
        save_file(mean, temporary / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)
        (temporary / SAFETENSORS_WEIGHTS_NAME).chmod(0o644)  # save_file makes it private to the user
        (temporary / CONFIG_NAME).write_bytes(text)
    return mean


def _check_same(
    first: Path, path: Path, ours: PeftConfig, theirs: PeftConfig, our_marks: dict, their_marks: dict
) -> None:
    """Raises ValueError at the first setting in which two adapters differ."""
    settings = []
    for config, marks in ((ours, our_marks), (theirs, their_marks)):
        base = str(config.base_model_name_or_path or "").rstrip("/").rpartition("/")[2]
        kept = {name: value for name, value in config.to_dict().items() if name not in _INCIDENTAL}
        settings.append(kept | {"base model": base} | marks)
    for name in dict.fromkeys([*settings[0], *settings[1]]):
        mine, other = (each.get(name) for each in settings)
        if mine != other:
            raise ValueError(
                f"{_WHO}: expected adapters with the same settings, {name} is {shown(mine)} in {first} and "
                f"{shown(other)} in {path}"
            )


def _check_tensors(first: Path, path: Path, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Raises ValueError at the first tensor that one adapter has and the other has not, or has differently."""
    if alone := sorted(ours.keys() ^ theirs.keys()):
        where = first if alone[0] in ours else path
        raise ValueError(f"{_WHO}: expected the same tensors in {first} and {path}, {alone[0]} is in {where} alone")
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape:
            sizes = list(ours[name].shape), list(tensor.shape)
            raise ValueError(f"{_WHO}: expected {name} as {sizes[0]}, as in {first}, got {sizes[1]} in {path}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{_WHO}: expected finite numbers, {name} in {path} holds others")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mmpeft-fast average`."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="adapters trained apart")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the averaged adapter")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="N", help="one a folder, such as samples seen (default: the same)"
    )


def run(args: argparse.Namespace) -> int:
    """Averages; returns 0."""
    tensors = average_peft(args.folders, args.output, weights=args.weights)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(f"{args.output}: the mean of {len(args.folders)} adapters, {numbers:,} numbers")
    return 0

"""Checkpoints for exact resume: trainable parameters, optimizer, schedule, random generators and position."""

import json
import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mmpeft_fast.atomic import new_folder
from mmpeft_fast.train.config import TrainConfig

PARAMETERS, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.pt", "state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")
# Fields that may change between a run and its continuation without changing a number in it.
_FREE_FIELDS = {"num_workers", "log_every", "save_every", "keep_checkpoints", "tracker"}


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after an optimizer step."""

    step: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What must be the same for a checkpoint to be continued."""

    config: TrainConfig
    num_samples: int
    num_processes: int
    num_steps: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the fields that are free to change."""
        config = {name: value for name, value in asdict(self.config).items() if name not in _FREE_FIELDS}
        return {**config, "num_samples": self.num_samples, "processes": self.num_processes, "steps": self.num_steps}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by dotted name; a tied one under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def rng_state() -> dict[str, Any]:
    """State of every generator a step may draw from: Python, NumPy, torch, and torch's on each CUDA device."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every generator back to what `rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def checkpoint_folder(output: Path, position: Position) -> Path:
    """Where a position's checkpoint stands."""
    return output / f"checkpoint-{position.step:06d}"


def save_checkpoint(
    output: Path,
    position: Position,
    identity: RunIdentity,
    model: nn.Module,
    optimizer_state: dict[str, Any],
    schedule_state: dict[str, Any],
    rng_states: list[dict[str, Any]],
) -> None:
    """Write `checkpoint-<step>` into output, whole or not at all, and drop the oldest beyond keep_checkpoints."""
    tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in trainable_parameters(model).items()}
    with new_folder(checkpoint_folder(output, position)) as temporary:
        save_file(tensors, temporary / PARAMETERS, metadata={"format": "pt"})
        (temporary / PARAMETERS).chmod(0o644)  # save_file makes it private to the user
        torch.save({"optimizer": optimizer_state, "schedule": schedule_state, "rng": rng_states}, temporary / OPTIMIZER)
        state = {"position": asdict(position), "run": identity.as_dict()}
        (temporary / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    for old in _checkpoints(output)[: -identity.config.keep_checkpoints]:
        shutil.rmtree(old)


def latest_checkpoint(output: Path) -> Path | None:
    """The checkpoint of the largest step, or None."""
    return (_checkpoints(output) or [None])[-1]


def read_position(folder: Path, identity: RunIdentity) -> Position:
    """Where the checkpoint stands. Raises ValueError if it is unreadable or belongs to a run with other settings."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        position, saved = Position(**state["position"]), state["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: expected a checkpoint of this program, its {STATE} cannot be read") from error
    differing = [
        f"{name} {saved.get(name)!r} (now {value!r})"
        for name, value in identity.as_dict().items()
        if saved.get(name) != value
    ]
    if differing:
        raise ValueError(f"{folder}: expected the settings the run began with: {', '.join(differing)}")
    return position


def load_checkpoint(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Copy the saved parameters into the model and return the states of optimizer, schedule and generators.

    Raises ValueError, before anything is copied, if names, shapes or dtypes differ or a file cannot be read.
    """
    try:
        saved = load_file(folder / PARAMETERS)
        states = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder}: expected a readable checkpoint ({error})") from error
    wanted = trainable_parameters(model)
    if saved.keys() != wanted.keys():
        odd = sorted(saved.keys() ^ wanted.keys())
        raise ValueError(
            f"{folder}: expected the model's {len(wanted)} trainable parameters, got {len(saved)}; "
            f"they differ in {odd[0]}"
        )
    for name, parameter in wanted.items():
        if (saved[name].shape, saved[name].dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"{folder}: expected {name} as {tuple(parameter.shape)} {parameter.dtype}, "
                f"got {tuple(saved[name].shape)} {saved[name].dtype}"
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])
    return states


def _checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_FOLDER.fullmatch(path.name)[1]))

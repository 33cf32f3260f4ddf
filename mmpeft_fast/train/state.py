"""Checkpoints for exact resume: trainable parameters, optimizer, schedule, random generators and position."""

import errno
import hashlib
import json
import pickle
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpeft_fast.atomic import clear_leftovers, new_folder, remove_folder
from mmpeft_fast.fields import at_least, check_fields
from mmpeft_fast.json_text import parse
from mmpeft_fast.train.identity import differences
from mmpeft_fast.train.sharding import spread_as

PARAMETERS, OPTIMIZER, STATE = "trainable.safetensors", "optimizer.pt", "state.json"
_FOLDER = re.compile(r"checkpoint-(\d{6,18})")
_WRITTEN = r"checkpoint-\d+|train_log\.jsonl|result\.json|adapter"  # what a run puts into its output
Count = Annotated[int, at_least(0)]


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after an optimizer step. Raises ValueError for what no run can reach."""

    step: Count = 0
    num_tokens: Count = 0
    num_supervised_tokens: Count = 0
    elapsed_s: Annotated[float, at_least(0)] = 0.0

    def __post_init__(self) -> None:
        check_fields(self)


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
    identity: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    optimizer_state: dict[str, Any],
    schedule_state: dict[str, Any],
    rng_states: list[dict[str, Any]],
) -> None:
    """Write `checkpoint-<step>` into output, whole or not at all. parameters: those that are trained, whole. Raises
    OSError where that fails, such as for lack of space; the checkpoints before it stay."""
    tensors = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in parameters.items()}
    states = {"optimizer": optimizer_state, "schedule": schedule_state, "rng": rng_states}
    with new_folder(checkpoint_folder(output, position)) as temporary:
        with _writing(temporary / PARAMETERS):
            save_file(tensors, temporary / PARAMETERS, metadata={"format": "pt"})
            (temporary / PARAMETERS).chmod(0o644)  # save_file makes it private to the user
        with _writing(temporary / OPTIMIZER):
            torch.save(states, temporary / OPTIMIZER)
        state = {"position": asdict(position), "run": identity}
        state["files"] = {name: _digest_of(temporary / name) for name in (PARAMETERS, OPTIMIZER)}
        state["digest"] = _digest(state)
        (temporary / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What safetensors and torch raise for a full disk is no OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise OSError(errno.EIO, f"cannot be written ({reason}); what was saved before is whole", str(path)) from error


def _digest_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def clear(output: Path, keep_checkpoints: int) -> None:
    """Drop the oldest checkpoints beyond `keep_checkpoints`, and what a killed run has left half-written."""
    clear_leftovers(output, _WRITTEN)
    for old in checkpoints(output)[:-keep_checkpoints]:
        remove_folder(old)


def latest_checkpoint(output: Path) -> Path | None:
    """The checkpoint of the largest step, or None."""
    return (checkpoints(output) or [None])[-1]


def read_position(folder: Path, identity: Mapping[str, Any]) -> Position:
    """Where the checkpoint stands. Raises ValueError if it is damaged or belongs to a run with other settings."""
    state = _read_state(folder)
    if differing := differences(state["run"], identity):
        raise ValueError(f"{folder}: expected the settings the run began with: {_few(differing)}")
    try:
        position = Position(**state["position"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: expected the position of a run in its {STATE}, but {error}") from error
    if checkpoint_folder(folder.parent, position) != folder or not 1 <= position.step <= identity["steps"]:
        raise ValueError(
            f"{folder}: expected the step of its name, of 1 to {identity['steps']}, in its {STATE}, got {position.step}"
        )
    return position


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = parse((folder / STATE).read_text(encoding="utf-8"), str(folder / STATE))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: expected a checkpoint of this program, its {STATE} cannot be read") from error
    if not isinstance(state, dict) or not {"position", "run", "files", "digest"} <= state.keys():
        raise ValueError(f"{folder}: expected a checkpoint of this program with its digests, its {STATE} has none")
    if state["digest"] != _digest(state):
        raise ValueError(f"{folder}: expected an undamaged checkpoint, its {STATE} has changed since it was written")
    return state


def _few(differing: list[str]) -> str:
    shown = ", ".join(differing[:8])
    return shown if len(differing) <= 8 else f"{shown} and {len(differing) - 8} more"


def load_checkpoint(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Copy the saved parameters into the model and return the states of optimizer, schedule and generators.

    Raises ValueError, before anything is copied, if names, shapes or dtypes differ or a file is not what was written.
    """
    files = _read_state(folder)["files"]
    try:
        for name in (PARAMETERS, OPTIMIZER):
            if _digest_of(folder / name) != files.get(name):
                raise ValueError(f"{name} has changed since it was written")
        saved = load_file(folder / PARAMETERS)
        states = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, AttributeError, pickle.UnpicklingError) as error:
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
            parameter.copy_(spread_as(saved[name], parameter))
    return states


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(_FOLDER.fullmatch(path.name)[1]))

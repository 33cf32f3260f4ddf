"""Adapters on disk in HF PEFT's format: adapter_config.json and adapter_model.safetensors.

`save_peft` writes what a model trains, `PeftModel.from_pretrained` and `load_peft` read it. A method that HF PEFT does
not have gets a folder of the same shape, with a peft_type that begins with MMPEFT_.
"""

import copy
from itertools import accumulate
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpeft_fast.atomic import new_folder, recover
from mmpeft_fast.methods import Method
from mmpeft_fast.models import base_model, family_of
from mmpeft_fast.peft_model import add_peft, train_parts
from mmpeft_fast.placement import Placement
from mmpeft_fast.stored.form import Slot
from mmpeft_fast.stored.forms import form_of
from mmpeft_fast.stored.hf_config import hf_config, method_of, read_config
from mmpeft_fast.stored.prefix import ENCODER_ROOT, PROMPT_KEY
from mmpeft_fast.stored.slots import Carried, bare_twin, mark_loaded, read_carried

__all__ = ["load_peft", "save_peft"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def save_peft(model: nn.Module, folder: str | Path) -> None:
    """Writes everything a model trains as a folder that `PeftModel.from_pretrained` loads, whole or not at all.

    A projected prefix is stored as HF PEFT does, materialised, and with the weights of its projection besides, which
    HF PEFT leaves unread.

    Args:
        model: with `add_peft` parameters, or a `PeftModel` (its active adapter); fused or not.
        folder: new, empty, or with nothing but an earlier adapter, which it replaces.

    Raises:
        ValueError: nothing to save, a trained parameter that has no place in the format, or other files in `folder`.
    """
    folder = recover(Path(folder))
    if folder.exists():
        check_replaceable(folder, "save_peft")
    base, metadata = base_model(model), {"format": "pt"}
    if isinstance(model, PeftModel):
        config, tensors = _of_peft_model(model)
    else:
        carried = read_carried(model)
        if carried is None:
            raise ValueError(f"save_peft: expected a model with PEFT parameters, got a plain {type(model).__name__}")
        config, tensors = hf_config(model, carried.method, parts=carried.parts), _stored(model, carried)
        metadata |= form_of(carried.method).metadata(carried.method)
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    origin = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}

    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as temporary:
        save_file(tensors, temporary / SAFETENSORS_WEIGHTS_NAME, metadata=metadata)
        (temporary / SAFETENSORS_WEIGHTS_NAME).chmod(0o644)  # save_file makes it private to the user
        config.save_pretrained(str(temporary), auto_mapping_dict=None if config.task_type else origin)


def load_peft(model: nn.Module, folder: str | Path, *, trainable: bool = True) -> nn.Module:
    """Puts a saved adapter into a model, in place; nothing is changed unless all of it fits.

    Args:
        model: a plain transformers model of a known family, which gets `add_peft` parameters, or one that carries
            fitting ones, fused or not.
        folder: written by `save_peft`, or by HF PEFT's `save_pretrained` for LoRA, IA3, LN-tuning or prefix-tuning. A
            method of one's own has to be known by then (`register_method`).
        trainable: whether the adapter's parameters require grad afterwards; everything else is frozen.

    Returns:
        The same model.

    Raises:
        ValueError: an unreadable folder, a configuration that `add_peft` has no equivalent of, or the first tensor
            that does not fit by name, shape or dtype.
    """
    if base_model(model) is not model:
        raise ValueError(
            f"load_peft: expected a transformers model, got a {type(model).__name__}; use its load_adapter"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("load_peft: expected a model with values, got one on the meta device")
    folder = recover(Path(folder))
    config, tensors, metadata = read_adapter(folder, "load_peft")
    carried, twin = read_carried(model), bare_twin(model)
    method, parts = method_of(config, twin)
    method = form_of(method).completed(method, metadata, tensors.keys())
    if carried is not None:
        _check_same(carried.method, method, model)
    fits, holder = (carried, model) if carried else (read_carried(_add(twin, method, parts)), twin)
    for key in form_of(method).derived(method, holder, family_of(holder)):
        tensors.pop(key, None)
    _check_tensors(tensors, fits.slots, folder)

    carried = carried or read_carried(_add(model, method, parts))
    model.requires_grad_(False)
    with torch.no_grad():
        for key, slot in carried.slots.items():
            slot.tensor.copy_(tensors[key].reshape(slot.tensor.shape))
            if isinstance(slot.tensor, nn.Parameter):
                slot.tensor.requires_grad_(trainable and slot.is_trained)
    mark_loaded(model, {slot.name for slot in carried.slots.values()})
    return model


def _add(model: nn.Module, method: Method, parts: tuple[str, ...]) -> nn.Module:
    add_peft(model, method)
    train_parts(model, family_of(model), set(parts))
    return model


def _stored(model: nn.Module, carried: Carried) -> dict[str, Tensor]:
    """The tensors of a model with `add_peft` parameters as they are stored."""
    tensors = {key: _copy(slot.tensor).reshape(slot.shape) for key, slot in carried.slots.items()}
    derived = form_of(carried.method).derived(carried.method, model, family_of(model))
    return tensors | {key: _copy(tensor) for key, tensor in derived.items()}


def _of_peft_model(model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Configuration and tensors of a PeftModel's active adapter as they are stored.

    Trained parameters of the base model that HF PEFT does not count to the adapter keep their names, under which it
    loads them.
    """
    adapter = model.active_adapter
    config = copy.deepcopy(model.peft_config[adapter])
    stored = get_peft_model_state_dict(model, adapter_name=adapter)
    tensors, places = {key: _copy(tensor) for key, tensor in stored.items()}, {_place(t) for t in stored.values()}
    if config.is_prompt_learning:
        encoder = model.prompt_encoder[adapter]
        if [tuple(p.shape) for p in encoder.parameters()] != [tuple(stored[PROMPT_KEY].shape)]:
            tensors |= {ENCODER_ROOT + name: _copy(parameter) for name, parameter in encoder.named_parameters()}
        places |= {_place(parameter) for parameter in encoder.parameters()}
    root = "base_model." if config.is_prompt_learning else "base_model.model."
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and _place(parameter) not in places:
            if not name.startswith(root) or _is_of_an_adapter(model, name):
                raise ValueError(
                    f"save_peft: {name} is trained, but is no part of the active adapter {adapter!r} and would be lost"
                )
            tensors[name] = _copy(parameter)
    return config, tensors


def _is_of_an_adapter(model: PeftModel, name: str) -> bool:
    modules = list(accumulate(name.split(".")[:-1], "{}.{}".format))
    return any(isinstance(model.get_submodule(module), BaseTunerLayer | ModulesToSaveWrapper) for module in modules)


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def _copy(tensor: Tensor) -> Tensor:
    """Memory of its own on the CPU: safetensors takes no views of one buffer."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def check_replaceable(folder: Path, who: str) -> None:
    """Raises ValueError, in the name of `who`, where a folder holds anything that an adapter must not replace."""
    if not folder.is_dir():
        raise ValueError(f"{who}: expected a folder, got the file {folder}")
    others = sorted({path.name for path in folder.iterdir()} - {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME})
    if others:
        raise ValueError(
            f"{who}: expected {folder} new, empty or with nothing but an adapter, it also holds {others[0]}"
        )


def read_adapter(folder: Path, who: str) -> tuple[PeftConfig, dict[str, Tensor], dict[str, str]]:
    """Configuration, tensors and the tensor file's metadata. Raises ValueError, in the name of `who`, where a file
    cannot be read."""
    config_path, tensors_path = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    try:
        text = config_path.read_text(encoding="utf-8")
        with safe_open(tensors_path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{who}: expected an adapter in {folder}, it cannot be read: {error}") from error
    return read_config(text, f"{who}: {config_path}"), tensors, metadata


def _check_same(carried: Method, saved: Method, model: nn.Module) -> None:
    """Raises ValueError unless both compute the same from the same tensors; how they are trained may differ."""
    family = family_of(model)
    num_layers = len(family.layers_of(model))
    ours, theirs = (
        (_computation(method.place(family.paths.roles)), method.adapted_layers(num_layers))
        for method in (carried, saved)
    )
    if ours != theirs:
        raise ValueError(f"load_peft: expected an adapter for the model's {carried}, got {saved}")


def _computation(placement: Placement) -> tuple:
    branches = {
        role: [
            (branch.position, branch.rank, float(f"{branch.scaling:.12g}"), branch.activation)
            + (
                branch.down_layers,
                branch.up_layers,
                branch.projection_seed is None,
                branch.vectors is None,
                branch.experts,
            )
            for branch in placement.branches_of(role)
        ]
        for role in placement.branches
    }
    return branches, dict(placement.scales), placement.prefix, placement.tasks, set(placement.gains)


def _check_tensors(tensors: dict[str, Tensor], slots: dict[str, Slot], folder: Path) -> None:
    """Raises ValueError at the first tensor that is missing, unknown or does not fit."""
    where = f"load_peft: {folder / SAFETENSORS_WEIGHTS_NAME}"
    if missing := sorted(slots.keys() - tensors.keys()):
        raise ValueError(f"{where}: expected a tensor {missing[0]}, there is none")
    if unknown := sorted(tensors.keys() - slots.keys()):
        raise ValueError(f"{where}: expected {len(slots)} tensors, it also has {unknown[0]}")
    first_key = {}
    for key, slot in slots.items():
        saved, twin = tensors[key], first_key.setdefault(id(slot.tensor), key)
        if tuple(saved.shape) != slot.shape:
            raise ValueError(f"{where}: expected {key} as {list(slot.shape)}, got {list(saved.shape)}")
        if saved.dtype not in _DTYPES:
            raise ValueError(f"{where}: expected {key} in one of {list(map(str, _DTYPES))}, got {saved.dtype}")
        if not saved.isfinite().all():
            raise ValueError(f"{where}: expected finite numbers, {key} holds nan or infinity")
        if not torch.equal(saved.to(slot.tensor.dtype).to(saved.dtype), saved):
            raise ValueError(
                f"{where}: {key} is {saved.dtype} and would be rounded to {slot.tensor.dtype}; load the base model in "
                f"{saved.dtype} (and convert the whole afterwards)"
            )
        if not torch.equal(saved, tensors[twin]):
            raise ValueError(f"{where}: {twin} and {key} differ, and are one weight in the model (tied)")

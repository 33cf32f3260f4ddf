"""One verdict on a result: as close to float64 as plain torch in the same dtype is, and the same bits twice."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmpeft_fast.closeness import allowed_error, relative_error

Outputs = Mapping[str, Tensor | None]


def mapped(tree, function: Callable[[Tensor], Tensor]):
    """The same nest of dicts, tuples and lists with every tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(mapped(value, function) for value in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(value, function) for value in tree)
    return tree


def cloned(tree):
    """A copy with the strides of the original, for functions that overwrite their operands.

    Tensors that were columns of one buffer are columns of one buffer again.
    """
    buffers: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in buffers:
            buffers[storage.data_ptr()] = storage.clone()
        new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return new.set_(buffers[storage.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

    return mapped(tree, copy)


def widened(tree):
    """Every floating-point tensor in float64."""
    return mapped(tree, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def verdict(got: Outputs, eager: Outputs, truth: Outputs, dtype: torch.dtype | None = None) -> dict[str, object]:
    """{"ok", "error", "eager_error", "output"}: the errors of the output that is worst beside what it is allowed.

    dtype: of the activations, where results are of a wider one.
    """
    worst = {"ok": True, "error": 0.0, "eager_error": 0.0, "output": None}
    for name, true in truth.items():
        if (got[name] is None) != (true is None):
            return {**worst, "ok": False, "output": name, "reason": "expected an output and its truth, got one of them"}
        if true is None:
            continue
        error, allowed = relative_error(got[name], true), allowed_error(eager[name], true, dtype)
        row = {"ok": error <= allowed, "error": error, "eager_error": relative_error(eager[name], true), "output": name}
        if not row["ok"]:
            row["reason"] = f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"
        # A nan compares as neither larger nor smaller.
        if not row["ok"] or not row["error"] <= worst["error"]:
            worst = row if worst["ok"] else worst
    return worst


def same_bits(one: Outputs, two: Outputs) -> bool:
    """Whether all outputs are equal bit by bit, nan included."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().flatten().view(torch.uint8)

    return all(
        (two[name] is None) if tensor is None else torch.equal(bits(tensor), bits(two[name]))
        for name, tensor in one.items()
    )

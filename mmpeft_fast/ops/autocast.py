"""Autocast as torch's own linear layers see it: operands are cast to its dtype, float64 is left alone."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    """A fact of the build of torch; not every compiler of torch can trace the question."""
    return torch.amp.is_autocast_available(device_type)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for where x is, or None outside of it."""
    kind = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context in which the operands of an op keep their dtypes."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)

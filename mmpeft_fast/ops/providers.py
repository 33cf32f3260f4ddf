"""Which kernel set runs an op: the device's best proven one (`ops.dispatch`), unless `provider` asks for another."""

import contextlib
import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from mmpeft_fast.ops import csrc, dispatch, kernels_torch

PROVIDERS = ("torch", "cpu", "triton", "cuda")

# One for the process: backward passes on an accelerator, and what activation checkpointing runs again in them, have a
# thread of their own. Compiled graphs are guarded by it.
_forced: str | None = None
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def provider(name: str) -> Iterator[None]:
    """Runs ops inside with the provider `name` where it can; backward passes follow their forward passes.

    What a provider cannot run goes to the torch provider, with one log line a reason.

    Raises:
        ValueError: unknown provider, or one that is not installed.
    """
    if name not in PROVIDERS:
        raise ValueError(f"provider: expected one of {list(PROVIDERS)}, got {name!r}")
    reason = why_not_installed(name)
    if reason is not None:
        raise ValueError(f"provider: expected an installed one, got {name!r}; {reason}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced_provider() -> str | None:
    return _forced


def why_not_installed(name: str) -> str | None:
    """What is missing for a provider, or None."""
    if name == "cpu":
        return csrc.why_unavailable()
    if name == "cuda" and csrc.why_no_cuda() is not None:
        return csrc.why_no_cuda()
    if name in ("triton", "cuda") and any(
        importlib.util.find_spec(part) is None for part in ("triton", "mmpeft_kernels")
    ):
        return "run: pip install triton"
    return None


def kernel_set(op: str, x: Tensor) -> ModuleType:
    """The module whose kernels run `op` on a tensor like x."""
    return kernel_set_of(_forced, op, x)


def kernel_set_of(forced: str | None, op: str, x: Tensor) -> ModuleType:
    """`kernel_set` where `forced` is the provider that was asked for, if any."""
    name = forced or dispatch.default_provider(op, x)
    if name != "torch":
        module = importlib.import_module(f"mmpeft_fast.ops.kernels_{name}")
        reason = module.unsupported(x)
        if reason is None:
            return module
        if forced:
            log_fallback(op, name, reason)
    return kernels_torch


@functools.cache
def log_fallback(op: str, name: str, reason: str, stand_in: str = "torch") -> None:
    """Says once that another provider stands in."""
    _logger.warning("%s: the %s provider cannot run %s; the %s provider does", op, name, reason, stand_in)


def provider_report(device: torch.device | str = "cpu") -> list[tuple[str, str, str]]:
    """(op, provider, reason) for every op on a device, with calls of many rows."""
    device = torch.device(device)
    return [(op, *dispatch.choose(op, device)) for op in dispatch.OPS]


def available_providers() -> list[tuple[str, str]]:
    """(provider, whether it is installed and where it is proven) for every provider that can be asked for."""
    proven = {name: [] for name in PROVIDERS}
    for table in dispatch.tables().values():
        for name in sorted(set(table.providers.values())):
            proven[name].append(table.device)
    rows = []
    for name in PROVIDERS:
        reason = why_not_installed(name)
        if reason is not None:
            rows.append((name, f"not installed; {reason}"))
        elif name in ("torch", "cpu"):
            rows.append((name, "installed"))
        else:
            where = ", ".join(proven[name])
            rows.append((name, f"installed; proven on {where}" if where else "installed; unproven: no GPU has run it"))
    return rows

"""Which implementation runs an op: the torch provider, unless another one is asked for.

A provider becomes the default of a device only once committed measurements on that device show it correct and faster.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

from mmpeft_fast.ops import kernels_torch

PROVIDERS = ("torch", "triton")

_forced: ContextVar[str | None] = ContextVar("mmpeft_fast_provider", default=None)
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
    if name == "triton" and not triton_is_installed():
        raise ValueError("provider: expected an installed one, got 'triton'; run: pip install triton")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def chosen_provider() -> str:
    return _forced.get() or "torch"


def kernel_set(op: str, x: Tensor) -> ModuleType:
    """The module whose kernels run `op` on a tensor like x: the chosen provider's, or torch's where it cannot."""
    name = chosen_provider()
    if name != "torch":
        module = importlib.import_module(f"mmpeft_fast.ops.kernels_{name}")
        reason = module.unsupported(x)
        if reason is None:
            return module
        log_fallback(op, name, reason)
    return kernels_torch


@functools.cache
def log_fallback(op: str, name: str, reason: str) -> None:
    """Says once that the torch provider stands in."""
    _logger.warning("%s: the %s provider cannot run %s; the torch provider does", op, name, reason)


def triton_is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "mmpeft_kernels"))


def provider_report() -> list[tuple[str, str, str]]:
    """(op, provider, reason) for every op of the kernel set."""
    plain = "plain PyTorch with a hand-written backward"
    waiting = f"{plain}; provider('triton') is unproven: no GPU measurement is committed"
    reasons = {"fused_linear": waiting if triton_is_installed() else plain}
    names = ("fused_linear", "attention", "rms_norm", "linear_cross_entropy", "dropout")
    return [(name, "torch", reasons.get(name, plain)) for name in names]

"""Who takes part: how each implementation is made of HF PEFT's model, and why one does not take part here."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bench.gpu import real_peers
from bench.suite import composites
from bench.suite.cases import Case
from mmpeft_fast import fuse
from mmpeft_fast.ops.providers import PROVIDERS, why_not_installed

Why = Callable[[Case, str], str | None]  # (case, device) -> what is missing


def _always(case: Case, device: str) -> None:
    return None


def _same(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """prepare: HF PEFT's model -> the model, changed in place; wrap: what is called -> what is called instead.

    narrow: adapters in the model's dtype, else as HF PEFT makes them. provider: forced, or the usual ones. is_opaque:
    its work is not seen op by op. start_s: about what it takes until it runs. peer: the name under which `real_peers`
    loads it, in a process of its own. missing: why it cannot run.
    """

    prepare: Callable[[nn.Module], nn.Module] = _same
    wrap: Callable[[Callable], Callable] = _same
    narrow: bool = False
    trains: bool = True
    is_fused: bool = False
    provider: str | None = None
    is_opaque: bool = False
    start_s: float = 0.0
    peer: str | None = None
    missing: Why = _always

    def why_not(self, case: Case, device: str) -> str | None:
        """Why it does not take part in a case on a device, or None."""
        if case.is_op and (self.narrow or self.is_opaque):
            return "has no single ops"
        return self.missing(case, device)


def _compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _no_narrower(case: Case, device: str) -> str | None:
    return "the same as peft where the model is in float32" if case.dtype == "fp32" else None


def _lora_alone(case: Case, device: str) -> str | None:
    return None if case.method == "lora" else f"has LoRA alone, not {case.method}"


def _by_hand_alone(case: Case, device: str) -> str | None:
    return _lora_alone(case, device) or ("has no dropout" if case.dropout else None)


def _graphs_alone(case: Case, device: str) -> str | None:
    if device != "cuda":
        return "CUDA graphs need a GPU"
    return None if case.what == "step" else "records whole models"


def _provider_why(name: str, case: Case, device: str) -> str | None:
    reason = why_not_installed(name)
    if reason is not None:
        return reason
    if name in ("triton", "cuda") and device != "cuda":
        return "needs a GPU"
    return f"has no kernels for {device}" if name == "cpu" and device != "cpu" else None


def _peer_why(name: str, case: Case, device: str) -> str | None:
    absent = [package for package in real_peers.NAMES[name] if importlib.util.find_spec(package) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if device != "cuda":
        return "needs a GPU"
    return _lora_alone(case, device) or (None if case.what == "step" else "takes whole models")


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "frozen": Implementation(trains=False),
    "peft": Implementation(),
    "peft_bf16": Implementation(narrow=True, missing=_no_narrower),
    "fused": Implementation(prepare=fuse, is_fused=True),
    "composite": Implementation(prepare=composites.split_steps, narrow=True, missing=_lora_alone),
    "manual": Implementation(prepare=composites.by_hand, narrow=True, missing=_by_hand_alone),
    "graphs": Implementation(
        prepare=functools.partial(fuse, cuda_graphs=True),
        is_fused=True,
        is_opaque=True,
        start_s=5.0,
        missing=_graphs_alone,
    ),
    # Inductor takes so long on two cores for a layer or two.
    "compile": Implementation(wrap=_compiled, is_opaque=True, start_s=30.0),
    **{
        f"fused_{name}": Implementation(
            prepare=fuse, is_fused=True, provider=name, missing=functools.partial(_provider_why, name)
        )
        for name in PROVIDERS
    },
    **{
        name: Implementation(
            peer=name, narrow=True, is_opaque=True, start_s=20.0, missing=functools.partial(_peer_why, name)
        )
        for name in real_peers.NAMES
    },
}


def named(names: list[str]) -> dict[str, Implementation]:
    """The implementations of these names, `frozen` and `peft` first: the others are measured by them.

    Raises:
        ValueError: a name that is not known.
    """
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"--implementations: expected some of {', '.join(IMPLEMENTATIONS)}, got {', '.join(unknown)}")
    return {name: IMPLEMENTATIONS[name] for name in dict.fromkeys(("frozen", "peft", *names))}

"""What of a model is fused, what is not, and why: read from the model as it stands, so it is never out of date."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from mmpeft_fast import hf_peft
from mmpeft_fast.layers.causal_lm import FusedCausalLM, why_not_known
from mmpeft_fast.layers.class_swap import is_swapped
from mmpeft_fast.layers.decoder_paths import DecoderPaths
from mmpeft_fast.layers.graphless import marked_modules
from mmpeft_fast.layers.reading import read_layer
from mmpeft_fast.layers.shared_contexts import context_summary
from mmpeft_fast.layers.sites import Unfusable, check_forward, packed_weights, read_norm
from mmpeft_fast.models import Family, base_model, family_of

__all__ = ["Candidate", "FuseReport", "Part", "candidates", "fuse_report", "report_of"]

PREFIX = "prefix of HF PEFT"
_NOT_YET = "not fused so far; fuse(model) takes it in"


class Candidate(NamedTuple):
    """A module that `fuse` gives a fused class, or why it cannot. `part`: the row of the report."""

    part: str
    fqn: str
    module: nn.Module
    reason: str | None = None


@dataclass(frozen=True)
class Part:
    """Modules of one kind: by dotted name why each stays as it was, or None where it is fused."""

    name: str
    reasons: Mapping[str, str | None]

    @property
    def kept(self) -> dict[str, str]:
        return {fqn: reason for fqn, reason in self.reasons.items() if reason is not None}


@dataclass(frozen=True)
class FuseReport:
    """`print` it: a table of parts, how many of each are fused, and what stays as it was and why."""

    parts: tuple[Part, ...]
    verified: str | None = None
    """What comparing the model with itself unfused has found, where that was asked for."""
    graphs: str | None = None
    """What runs as CUDA graphs, where that was asked for, and why other calls did not."""
    recompute: str | None = None
    """What is made again in the backward in place of being kept."""
    contexts: str | None = None
    """In how many calls rows shared what they begin with, where that was asked for, and why not in the others."""
    tail: str | None = None
    """Why a fused loss does not run the last layer at labelled positions alone, if so."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """In which storage formats fused decoder layers have their packed weights, by dotted name."""

    @property
    def kept(self) -> dict[str, str]:
        """Why each module that is not fused is not, by dotted name."""
        return {fqn: reason for part in self.parts for fqn, reason in part.kept.items()}

    @property
    def num_modules(self) -> int:
        return sum(len(part.reasons) for part in self.parts)

    def summary(self) -> str:
        """One sentence that counts and names what is not fused."""
        reasons = "; ".join(f"{_named(fqns)}: {reason}" for reason, fqns in _by_reason(self.kept))
        return f"{len(self.kept)} of {self.num_modules} modules stay as they were: {reasons or 'none'}"

    def __str__(self) -> str:
        rows = [("part", "fused", "stays as it was")]
        for part in self.parts:
            fused = f"{len(part.reasons) - len(part.kept)}/{len(part.reasons)}"
            lines = [f"{_named(fqns)}: {reason}" for reason, fqns in _by_reason(part.kept)] or [""]
            rows += [(part.name, fused, lines[0]), *(("", "", line) for line in lines[1:])]
        widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}".rstrip() for row in rows]
        more = {
            "the last layer runs at every position": self.tail,
            "against the unfused model": self.verified,
            "CUDA graphs": self.graphs,
            "made again in the backward": self.recompute,
            "beginnings of rows shared": self.contexts,
            "weights unpacked at every call": self._formats_said(),
        }
        return "\n".join([*lines, *(f"{what}: {said}" for what, said in more.items() if said is not None)])

    def _formats_said(self) -> str | None:
        counts = Counter(self.formats.values())
        return "; ".join(f"{names} in {count} layers" for names, count in counts.items()) or None


def _formats_of(layer: nn.Module) -> str:
    """Names of the formats of a layer's packed weights; empty where none is, or it can be read no more."""
    try:
        return ", ".join(sorted({weight.name for weight in packed_weights(layer).values()}))
    except Unfusable:
        return ""


def _by_reason(kept: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    for reason in dict.fromkeys(kept.values()):
        yield reason, [fqn for fqn, other in kept.items() if other == reason]


def _named(fqns: list[str]) -> str:
    more = f" and {len(fqns) - 2} more" if len(fqns) > 2 else ""
    return ", ".join(fqns[:2]) + more


def fuse_report(model: nn.Module) -> FuseReport:
    """What `fuse` has done to a model (a `PeftModel` or what is inside), as it stands now. An unknown architecture has
    a report too: one part, not fused."""
    base = base_model(model)
    try:
        found = candidates(model, family_of(base))
    except ValueError as error:
        return report_of([Candidate("model", type(base).__name__, base, str(error))])
    found = [seen._replace(reason=seen.reason or (None if is_swapped(seen.module) else _NOT_YET)) for seen in found]
    graphs = next((graphs for seen in found if (graphs := seen.module.__dict__.get("graphs")) is not None), None)
    fused = [seen for seen in found if seen.part == "decoder layers" and seen.reason is None]
    return replace(
        report_of(found),
        formats={seen.fqn: names for seen in fused if (names := _formats_of(seen.module))},
        verified=base.__dict__.get("verified"),
        graphs=None if graphs is None else graphs.summary(),
        recompute=next((", ".join(parts) for seen in found if (parts := seen.module.__dict__.get("recompute"))), None),
        contexts=context_summary(base.base_model) if isinstance(base, PreTrainedModel) else None,
        tail=base.why_no_tail() if isinstance(base, FusedCausalLM) else None,
    )


def report_of(found: list[Candidate]) -> FuseReport:
    """The report in which all candidates without a reason are fused."""
    parts: dict[str, dict[str, str | None]] = {}
    for seen in found:
        parts.setdefault(seen.part, {})[seen.fqn] = seen.reason
    return FuseReport(tuple(Part(name, reasons) for name, reasons in parts.items()))


def candidates(model: nn.Module, family: Family) -> list[Candidate]:
    """Everything that `fuse` looks at in a model of this family, inside any wrapper, fused already or not."""
    hf_peft.register_readers()
    base = base_model(model)
    names = {id(module): fqn for fqn, module in base.named_modules()}
    paths, layers, norm = family.paths, family.layers_of(base), family.paths.norm_of(family.decoder_of(base))
    found = [
        Candidate("decoder layers", names[id(layer)], layer, _why_no_layer(layer, paths, layers)) for layer in layers
    ]
    found.append(Candidate("final norm", names[id(norm)], norm, _why_no_norm(norm)))
    found.append(Candidate("head and loss", type(base).__name__, base, _why_no_head(base)))
    for module in marked_modules(family.modules_at(base, family.vision_tower), base):
        found.append(Candidate("vision tower", names[id(module)], module, _reason(module)))
    if hf_peft.has_prefix(model):
        found.append(Candidate(PREFIX, type(model).__name__, model, _why_no_prefix(found, family.full_attention(base))))
    # Whatever else carries adapters of HF PEFT is no part of the fused computation.
    inside = {id(inner) for layer in layers for site in paths.sites_in(layer) for inner in site.modules()}
    for fqn, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and id(module) not in inside and module is not norm:
            reason = "outside the decoder's linear layers and norms"
            found.append(Candidate("other PEFT layers", fqn, module, reason))
    return found


def _why_no_prefix(found: list[Candidate], is_full_attention: bool) -> str | None:
    """HF PEFT's prefix lies in a cache; the fused one is handed to every layer and seen by every query."""
    if any(seen.reason is not None for seen in found if seen.part == "decoder layers"):
        return "a layer that is not fused would not see it"
    return None if is_full_attention else "the decoder's window slides past it, which the fused one does not"


def _why_no_layer(layer: nn.Module, paths: DecoderPaths, layers: list[nn.Module]) -> str | None:
    if sum(other is layer for other in layers) > 1:
        return "the same layer occurs more than once"
    devices = sorted({str(parameter.device) for parameter in layer.parameters()})
    if len(devices) > 1:
        return f"its parameters lie on {', '.join(devices)}; expected one device"
    return _reason(layer, lambda layer: read_layer(layer, paths))


def _why_no_head(model: nn.Module) -> str | None:
    return model.__dict__.get("refused") or why_not_known(model)


def _why_no_norm(norm: nn.Module) -> str | None:
    return _reason(norm, lambda norm: read_norm(norm, is_called=True))


def _reason(module: nn.Module, read: Callable[[nn.Module], object] | None = None) -> str | None:
    """Why a module cannot be given a fused class, or None. What wraps a fused class's forward later is no reason; what
    was seen to compute something else is."""
    if "refused" in module.__dict__:
        return module.refused
    try:
        if not is_swapped(module):
            check_forward(module)
        if read is not None:
            read(module)
    except Unfusable as reason:
        return str(reason)
    return None

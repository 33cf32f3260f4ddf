"""Frozen vision towers build no graph only because `enable_input_require_grads()` asked for one.

Autograd builds no graph where nothing requires grad. transformers' `enable_input_require_grads()`, which re-entrant
activation checkpointing of a decoder needs, marks the output of a tower's embedding too: a frozen tower then keeps
everything for a gradient that nobody reads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from mmpeft_fast.layers.class_swap import Swapped
from mmpeft_fast.layers.known import is_library, is_shipped, package_of
from mmpeft_fast.layers.sites import Unfusable, check_no_global_hooks, recorded_key


class Graphless(Swapped):
    """Mixin for the module whose output `enable_input_require_grads()` marks: takes the mark off again where nothing
    in the `tower` can need it.

    What comes in and requires grad (pixels, a prompt) leaves a `grad_fn` on the output, which then is no leaf and stays
    as it is. The mark is needed by trained blocks under re-entrant checkpointing alone, so it goes where the tower has
    no tensor that requires grad, no hook but transformers' own and no forward but the libraries'.
    """

    tower: tuple[nn.Module, ...] = ()  # everything between the pixels and the connector, this module among it

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)

    def __call__(self, *args, **kwargs):  # hooks run in here, so that their marks are seen
        y = super().__call__(*args, **kwargs)
        if torch.compiler.is_compiling() or not isinstance(y, Tensor) or not (y.requires_grad and y.is_leaf):
            return y
        return y.detach() if self._tower_is_frozen() else y

    def _tower_is_frozen(self) -> bool:
        try:
            check_no_global_hooks()
        except Unfusable:
            return False
        return bool(self.tower) and all(_is_frozen(module) for part in self.tower for module in part.modules())


def _is_frozen(module: nn.Module) -> bool:
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    if not all(map(_only_looks, (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))):
        return False
    if "forward" in module.__dict__ or not is_library(type(module).forward):
        return False
    return not any(tensor.requires_grad for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and plain attributes."""
    for held in (module._parameters, module._buffers, module.__dict__):
        yield from (value for value in held.values() if isinstance(value, Tensor))


def _only_looks(hook) -> bool:
    """Whether a hook is the one that sets the mark, one that records outputs, or one of this package, which count."""
    is_mark = getattr(hook, "__name__", None) == "make_inputs_require_grads"
    is_known = (is_mark and is_shipped(hook, modeling_utils.__name__)) or recorded_key(hook) is not None
    return is_known or package_of(hook) == "mmpeft_fast"


def marked_modules(towers: list[nn.Module], model: nn.Module) -> list[nn.Module]:
    """The modules in these towers whose outputs `enable_input_require_grads()` marks."""
    inside = {id(inner) for tower in towers for inner in tower.modules()}
    found = []
    for part in model.modules():
        if isinstance(part, modeling_utils.PreTrainedModel):
            try:
                embeddings = part.get_input_embeddings()
            except NotImplementedError:
                continue
            if id(embeddings) in inside and embeddings not in found:
                found.append(embeddings)
    return found

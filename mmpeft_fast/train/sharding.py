"""A model spread over processes, layer by layer (FSDP2: `torch.distributed.fsdp.fully_shard`), and its tensors whole.

What is written is whole, so that a run can go on in any number of processes, spread or not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from mmpeft_fast.models import base_model, family_of


def shard(model: nn.Module) -> nn.Module:
    """Spreads a model's parameters over all processes in place; its decoder layers are gathered one at a time."""
    base = base_model(model)
    for layer in family_of(base).layers_of(base):
        fully_shard(layer)
    return fully_shard(model)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """What lies around a spread model's decoder layers is whole inside: generation calls the tower by itself."""
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(tree: Any) -> Any:
    """The same with every tensor as one process would have it; all processes call this."""
    return tree_map(lambda leaf: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf, tree)


def spread_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as `like` is; the tensor itself where that is whole."""
    return (
        distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        if isinstance(like, DTensor)
        else tensor
    )


def spread_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A state of whole tensors as the optimizer takes it: what has its parameter's shape is spread as that is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def of(parameter: Tensor, value: Any) -> Any:
        return spread_as(value, parameter) if torch.is_tensor(value) and value.shape == parameter.shape else value

    spread = {
        index: {name: of(parameters[index], value) for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": spread}

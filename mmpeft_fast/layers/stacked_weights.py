"""Weights that share an input (q, k, v; gate, up) moved into one buffer, so that they are one GEMM.

Every module keeps its parameter: same object, name, shape and values; only its memory is now rows of the buffer. What
somebody else may hold on to is left where it is: shared, tied, sharded or read-only tensors.

Libraries take tensors in one storage for tied ones, and drop, refuse or write them several times when they save. A
`state_dict` therefore shows each stacked tensor in a storage of its own, over the same memory.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mmpeft_fast.layers.sites import is_plain, read_linear
from mmpeft_fast.ops import dispatch, layout, stacking
from mmpeft_fast.ops.packed import PackedWeight
from mmpeft_fast.ops.segments import Segment


def owners(model: nn.Module) -> Counter:
    """How many parameters and buffers of the model lie in each storage."""
    tensors = [*model.parameters(), *model.buffers()]
    return Counter(tensor.untyped_storage()._cdata for tensor in tensors if _has_storage(tensor))


def _has_storage(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.layout == torch.strided


def _is_movable(tensor: Tensor, owned: Counter) -> bool:
    if not _has_storage(tensor) or not tensor.is_contiguous() or tensor.is_inference():
        return False
    storage = tensor.untyped_storage()
    return owned[storage._cdata] == 1 and storage.nbytes() == tensor.numel() * tensor.element_size()


def stack_rows(tensors: Sequence[Tensor], owned: Counter, *, spare: int = 0) -> bool:
    """Makes tensors [N_i, ...] rows of one new buffer, in place; False, and nothing moved, where one may not be moved.

    owned: as `owners` gives it; brought up to date. spare: columns that the buffer has behind matrices [N_i, K], for
    the layout realisation (`ops.layout`).
    """
    first = tensors[0]
    alike = all(t.shape[1:] == first.shape[1:] and t.dtype == first.dtype and t.device == first.device for t in tensors)
    if not alike or not all(_is_movable(tensor, owned) for tensor in tensors):
        return False
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        return False
    if spare:
        buffer = first.new_zeros(sum(tensor.shape[0] for tensor in tensors), first.shape[1] + spare)
        rows = buffer[:, : first.shape[1]]
        torch.cat([tensor.detach() for tensor in tensors], out=rows)
    else:
        buffer = rows = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, rows.split([tensor.shape[0] for tensor in tensors]), strict=True):
        owned[tensor.untyped_storage()._cdata] -= 1
        tensor.data = part
        layout.mark(tensor, spare)
    owned[buffer.untyped_storage()._cdata] = len(tensors)
    return True


def _adapters(segments: Sequence[Segment]) -> Iterable[list[Tensor]]:
    """What one launch reads together besides the weights: biases, then down and up of each branch."""
    yield [segment.bias for segment in segments]
    if len({len(segment.branches) for segment in segments}) == 1:
        for branches in zip(*(segment.branches for segment in segments), strict=True):
            yield [branch.down for branch in branches]
            yield [branch.up for branch in branches]


def _spare(segments: Sequence[Segment]) -> int:
    """Columns to keep behind the weights for U, 16-byte aligned; 0 where another realisation is the better one."""
    weight = segments[0].weight
    if isinstance(weight, PackedWeight):  # it is unpacked into rows that are close together
        return 0
    ranks = [branch.down.shape[0] for segment in segments for branch in segment.branches]
    num_out = sum(segment.weight.shape[0] for segment in segments)
    if not ranks or any(branch.position != "parallel" for segment in segments for branch in segment.branches):
        return 0
    if not dispatch.wants_layout(weight.device, weight.dtype, num_out, weight.shape[1], max(ranks)):
        return 0
    aligned = 16 // weight.element_size()
    return -(-sum(ranks) // aligned) * aligned


def stack_linears(linears: Sequence[nn.Module], owned: Counter) -> None:
    """Stacks weights, biases and branches of linear sites that share an input, group by group where that is allowed."""
    segments = [read_linear(linear).segment for linear in linears]
    weights, spare = [segment.weight for segment in segments], _spare(segments)
    if any(isinstance(weight, PackedWeight) for weight in weights):
        pass  # rows of one buffer whenever they are unpacked
    elif spare > layout.spare_columns(weights[0]) or stacking.as_rows(weights) is None:
        stack_rows(weights, owned, spare=spare)
    for group in _adapters(segments):
        if all(tensor is not None for tensor in group) and stacking.as_rows(group) is None:
            stack_rows(group, owned)
    for linear in linears:
        for module in linear.modules():
            if show_own_storages not in module._state_dict_hooks.values():
                module.register_state_dict_post_hook(show_own_storages)


def show_own_storages(module: nn.Module, state_dict: dict, prefix: str, local_metadata: object) -> None:
    """state_dict hook: a stacked tensor as one over the same memory that has a storage to itself, of just its size. It
    is no copy; writing to it writes to the parameter."""
    for name, parameter in module._parameters.items():
        value = state_dict.get(prefix + name)
        # With `keep_vars` the value is the parameter, which stays what it is.
        if value is not parameter and type(value) is Tensor and _is_stacked(parameter) and not value.is_meta:
            state_dict[prefix + name] = torch.from_dlpack(value)


def unstack(model: nn.Module) -> None:
    """Gives every stacked parameter contiguous memory of its own again."""
    for module in model.modules():
        hooks = module._state_dict_hooks
        for key in [key for key, hook in hooks.items() if hook is show_own_storages]:
            del hooks[key]
        for parameter in module._parameters.values():
            if _is_stacked(parameter):
                parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
                layout.unmark(parameter)


def _is_stacked(tensor: Tensor | None) -> bool:
    """Whether `stack_rows` has moved a tensor, and nobody since."""
    if tensor is None or not layout.is_marked(tensor) or not _has_storage(tensor):
        return False
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()

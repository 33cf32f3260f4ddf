"""Frozen weights that lie in memory in another format than they are multiplied in.

A `PackedWeight` stands in a segment where a tensor [N, K] does. A fused linear call unpacks its weights in its forward
and again in its backward, as rows of one buffer, so that q, k and v (gate and up) stay one GEMM; between the two
nothing of them is kept. On a CPU that buffer is memory that all calls of a thread share, because fresh memory costs
about as much as filling it; elsewhere torch's allocator hands the same block to every layer.
"""

import copy
import threading
import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class PackedWeight:
    """A frozen weight [N, K] in a storage format of its own; subclasses say how it is read.

    shape: [N, K]. device: where it lies. dtype: what it is multiplied in, None for the dtype of what it is multiplied
    with. name: of the format, in reports.
    """

    name = "packed"
    ndim = 2
    requires_grad = False
    _buffer: "_Buffer | None" = None

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype | None):
        self.shape, self.device, self.dtype = torch.Size(shape), device, dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it lies in memory as."""
        raise NotImplementedError

    def unpack(self, out: Tensor) -> None:
        """Writes the weight to `out` [N, K], of any float dtype; its rows may be apart."""
        raise NotImplementedError

    def why_not_now(self) -> str | None:
        """Why its layer would compute something else at this moment, or None."""
        return None

    def to(self, dtype: torch.dtype) -> "PackedWeight":
        """The same weight, multiplied in `dtype`."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as a tensor [N, K] of its own."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.unpack(out)
        return out


class _Buffer:
    """Memory for the weights of one call; it grows to the largest."""

    def __init__(self):
        self._memory: Tensor | None = None

    def view(self, num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
        if self._memory is None or self._memory.numel() < num_rows * width:
            self._memory = None  # before the larger one is there
            with torch.inference_mode(False):  # else only an inference pass could write to it
                self._memory = torch.empty(num_rows * width, dtype=dtype)
        return self._memory[: num_rows * width].view(num_rows, width)


# By thread and dtype; they live as long as a weight that has used them.
_buffers: "weakref.WeakValueDictionary[tuple[int, torch.dtype], _Buffer]" = weakref.WeakValueDictionary()


def _rows_for(weights: Sequence[PackedWeight], dtype: torch.dtype) -> Tensor:
    first, num_rows = weights[0], sum(weight.shape[0] for weight in weights)
    if first.device.type != "cpu" or torch._C._len_torch_dispatch_stack():  # a mode may make tensors without memory
        return torch.empty(num_rows, first.shape[1], dtype=dtype, device=first.device)
    key = threading.get_ident(), dtype
    first._buffer = buffer = _buffers.get(key) or _buffers.setdefault(key, _Buffer())
    return buffer.view(num_rows, first.shape[1], dtype)


def unpacked(packed: Mapping[int, PackedWeight], tensors: Sequence, dtype: torch.dtype) -> list:
    """`tensors` with dense weights in the places of packed ones: successive rows of one buffer, good until the next
    call on this thread. packed: weights of one width by place."""
    filled = list(tensors)
    weights = list(packed.values())
    rows = _rows_for(weights, dtype).split([weight.shape[0] for weight in weights])
    for (place, weight), out in zip(packed.items(), rows, strict=True):
        weight.unpack(out)
        filled[place] = out
    return filled

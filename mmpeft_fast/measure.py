"""Counting bytes: what autograd keeps for the backward, and the peak of a step."""

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _model_storages(model: nn.Module | None) -> set[int]:
    if model is None:
        return set()
    return {_storage_key(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors}


class saved_bytes:
    """Bytes that autograd keeps for the backward of what runs inside: unique storages, whole, without those of the
    model's parameters and buffers.

        with saved_bytes(model) as saved:
            loss = model(**batch).loss
        saved.bytes

    Works on fake tensors. Tensors saved and released again inside (activation checkpointing) still count.
    """

    def __init__(self, model: nn.Module | None = None):
        self._excluded = _model_storages(model)
        self._seen: dict[int, torch.UntypedStorage] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.bytes = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _storage_key(tensor)
        if key not in self._excluded and key not in self._seen:
            storage = tensor.untyped_storage()
            self._seen[key] = storage  # keeps the address from being reused while counting
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> "saved_bytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._hooks.__exit__(*exception)
        self._seen.clear()


class _LiveStorages(TorchDispatchMode):
    """Follows every storage that an op returns until it is freed."""

    def __init__(self, alive: set[int]):
        super().__init__()
        self._known = set(alive)
        self.live = self.peak = 0

    def _release(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known.add(key)
                nbytes = storage.nbytes()
                self.live += nbytes
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, key, nbytes)
        return out


class peak_bytes:
    """Peak bytes of tensors while something runs, the model's parameters, buffers and gradients included.

    CUDA: the caching allocator's maximum of allocated bytes. Otherwise: storages that ops return, followed from birth
    to release, plus what the model held before; scratch memory inside an op is not seen. The bookkeeping costs time:
    never measure time inside. Works on fake tensors; then `.live` is what is alive now.
    """

    def __init__(self, device: torch.device | str = "cpu", model: nn.Module | None = None):
        self.device = torch.device(device)
        self.bytes = 0
        held = {}
        if model is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                for part in (tensor, tensor.grad):
                    if part is not None:
                        held[_storage_key(part)] = part.untyped_storage().nbytes()
        self._held = held
        self._mode = _LiveStorages(set(held))

    @property
    def live(self) -> int:
        """Bytes born inside and still alive."""
        return self._mode.live

    def __enter__(self) -> "peak_bytes":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._mode.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._mode.__exit__(*exception)
            self.bytes = sum(self._held.values()) + self._mode.peak

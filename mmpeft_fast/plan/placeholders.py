"""Running real model code at full size without its memory: weights and activations are placeholders, indices are real.

Placeholders are meta tensors where a GPU is planned for, and fake CPU tensors for the CPU: what code asks of
`tensor.device` then gives the kernels of that device. Token ids, positions, masks and grids are real CPU tensors, so
code whose shapes depend on their values (image grids, window attention) runs as it does in training.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_aten = torch.ops.aten
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
_FLASH_DTYPES = (torch.float16, torch.bfloat16)


def is_placeholder(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _is_index(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point and not tensor.dtype.is_complex


def _num_true(mask: Tensor) -> int:
    """True elements of a real mask; those of an expanded dimension are counted once and multiplied."""
    repeats = 1
    for dim, (length, stride) in enumerate(zip(mask.shape, mask.stride(), strict=True)):
        if length and not stride:
            mask, repeats = mask.narrow(dim, 0, 1), repeats * length
    return repeats * int(mask.count_nonzero())


class Placeholders(TorchDispatchMode):
    """Everything that runs inside may mix placeholders with real index tensors.

    An op gives a placeholder where it takes one or draws random numbers, else real values. Enter it before modes that
    count, so that they do not see its conversions.

    Args:
        device_type: "cuda" or "cpu", the device that is planned for.
        sdpa: the library's attention without a mask on that GPU, "flash" (torch's FlashAttention-2) or "cudnn".
    """

    def __init__(self, device_type: str, sdpa: str = "flash"):
        super().__init__()
        self._sdpa = sdpa
        self.device = torch.device("cpu" if device_type == "cpu" else "meta")
        self._fake = FakeTensorMode(allow_non_fake_inputs=True) if device_type == "cpu" else None
        self._functions = self.functions()
        self._memory: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    def functions(self) -> AbstractContextManager:
        """The part of this mode that acts above torch's dispatcher."""
        return contextlib.nullcontext() if self._fake is not None else _GpuFunctions(self._sdpa)

    def __enter__(self) -> "Placeholders":
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        self._functions.__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _INDEXED and is_placeholder(args[0]):
            args = (args[0], self._positions(args[1]), *args[2:])
        tensors = list(_operands((*args, *kwargs.values())))
        if any(map(is_placeholder, tensors)):
            if self._fake is None and not all(tensor.is_meta for tensor in tensors):
                args, kwargs = tree_map(_to_meta, (args, kwargs))
            return func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and self._fake is not None:
            with self._fake:
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        makes_index = isinstance(out, Tensor) and out.is_meta and _is_index(out)
        if makes_index and torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **{**kwargs, "device": torch.device("cpu")})
        return out

    def _positions(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Indices without bool masks, whose true elements become as many placeholders of positions."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool or is_placeholder(index):
                found.append(index)
            else:
                number = _num_true(index)
                found += [self.empty(number, dtype=torch.int64) for _ in range(index.dim())]
        return found

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised placeholder."""
        if self._fake is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        with self._fake:
            return torch.empty(shape, dtype=dtype)

    def materialize(self, model: nn.Module) -> nn.Module:
        """Gives a meta model parameters and buffers that are placeholders of the device, in place. Tensors that share
        memory, such as stacked weights, share it afterwards."""
        if self._fake is None:
            return model
        parameters: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None and value.is_meta:
                    if id(value) not in parameters:
                        placed = self.placed(value.detach())
                        parameters[id(value)] = nn.Parameter(placed, requires_grad=value.requires_grad)
                    module._parameters[name] = parameters[id(value)]
            for name, value in module._buffers.items():
                if value is not None and value.is_meta:
                    module._buffers[name] = self.placed(value)
        return model

    def placed(self, tensor: Tensor) -> Tensor:
        """A meta tensor as a placeholder of the device; memory that it shares with others stays shared."""
        if self._fake is None:
            return tensor
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            # The storage is held: a later one would take its number.
            memory = self.empty(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype)
            self._memory[storage._cdata] = storage, memory
        return self._memory[storage._cdata][1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _operands(values) -> Iterator[Tensor]:
    """Tensors among an op's arguments, also in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _operands(value)


def _to_meta(leaf):
    return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf


class _GpuFunctions(TorchFunctionMode):
    """What torch decides by device type above its dispatcher, decided for meta tensors as on a CUDA GPU."""

    def __init__(self, sdpa: str):
        super().__init__()
        self._sdpa = sdpa

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args and args[0].is_meta:
            return _gpu_attention(self._sdpa, *args, **kwargs)
        if func is torch.nn.functional.dropout and args and args[0].is_meta:
            return _gpu_dropout(*args, **kwargs)
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            value = func(*args, **{**kwargs, "device": "cpu"})
            return value if _is_index(value) else value.to("meta")
        return func(*args, **kwargs)


def _gpu_dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """On a CUDA GPU dropout is one kernel that keeps a mask of a byte an element; elsewhere it is several ops that keep
    one in the input's dtype."""
    if not training or not 0 < p < 1 or inplace:
        return torch.dropout_(x, p, training) if inplace else torch.dropout(x, p, training)
    return torch.native_dropout(x, p, True)[0]


def _gpu_attention(
    sdpa, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Tensor:
    """The fused kernel that torch takes on a CUDA GPU: flash or cuDNN's without a mask, the memory-efficient one with
    it."""
    if not q.dtype == k.dtype == v.dtype:  # as torch's, which refuses them on any device
        raise ValueError(f"attention: expected q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    head_dim = q.shape[-1]
    if sdpa == "cudnn" and attn_mask is None and q.dtype in _FLASH_DTYPES and not head_dim % 8 and head_dim <= 128:
        needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return _aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, needs_grad, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask is None and q.dtype in _FLASH_DTYPES and head_dim <= 256:
        pad = -head_dim % 8
        q, k, v = (torch.nn.functional.pad(x, (0, pad)) if pad else x for x in (q, k, v))
        scale = head_dim**-0.5 if scale is None else scale
        out = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :head_dim] if pad else out
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            blank = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device)
            attn_mask = blank.masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]

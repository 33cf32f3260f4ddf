"""Random arrays in hostile layouts, and the comparison of two kernel sets on them."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tests.closeness import assert_as_close_as_eager


def strided(*shape: int, dtype: torch.dtype, offset: int = 3, gap: int = 5) -> Tensor:
    """Normal values whose last dimension is contiguous, with gaps between rows and an odd storage offset."""
    wide = torch.randn(*shape[:-1], shape[-1] + gap + offset).to(dtype)
    return wide[..., offset : offset + shape[-1]]


def contiguous(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


LAYOUTS: dict[str, Callable[..., Tensor]] = {"strided": strided, "contiguous": contiguous}


def mapped(value, function: Callable[[Tensor], Tensor]):
    """`value` with `function` applied to every tensor within (named) tuples and lists; other leaves as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, function) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, function) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, function) for key, item in value.items()}
    return value


def doubled(value):
    """The same arguments in float64, integers as they are."""
    return mapped(value, lambda x: x.detach().clone().double() if x.is_floating_point() else x)


def cloned(value):
    """Copies with the same layout and storage offset, so that kernels may overwrite them."""

    def clone(x: Tensor) -> Tensor:
        storage = x.untyped_storage().clone()
        return torch.empty(0, dtype=x.dtype).set_(storage, x.storage_offset(), x.shape, x.stride())

    return mapped(value, clone)


def leaves(value) -> Iterable[Tensor | None]:
    """The tensors (and Nones) of a nested result, in order."""
    if value is None or isinstance(value, Tensor):
        yield value
    else:
        for item in value:
            yield from leaves(item)


def assert_same_set(cpu: Callable, plain: Callable, arguments: tuple, options: dict, what: str) -> tuple:
    """Runs both functions on the same arguments; `cpu` may be as far from float64 as `plain` is. Returns its result."""
    result = cpu(*cloned(arguments), **cloned(options))
    eager = plain(*cloned(arguments), **cloned(options))
    truth = plain(*doubled(arguments), **doubled(options))
    got, expected, exact = (list(leaves(value)) for value in (result, eager, truth))
    assert len(got) == len(expected) == len(exact), what
    for i, (a, b, c) in enumerate(zip(got, expected, exact, strict=True)):
        assert (a is None) == (b is None) == (c is None), f"{what}: result {i}"
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: result {i}"
            assert_as_close_as_eager(a, b, c, f"{what}: result {i}")
    return result

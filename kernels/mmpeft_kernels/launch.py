"""How every kernel is launched: on its operands' device and that device's current stream, with a tile that fits it.

Launchers hand `launch` what they would hand Triton, and `fitted` everything that depends on the tile. A tile is made
smaller by arithmetic (`shared_memory`) before anything is compiled; where a compiler takes more than the arithmetic
says, the next smaller tile runs and is remembered for these operands on this device.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from triton.runtime.errors import OutOfResources

from mmpeft_kernels import shared_memory
from mmpeft_kernels.tile import Tile, smaller

_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)
# (what a launch is called, its footprint, its device, the tile asked for) -> the tile that runs.
_fitting: dict[tuple, Tile] = {}
_exact = False
_observed = threading.local()


def launch(kernel, grid: tuple[int, ...], device, *args, **options) -> None:
    """Runs `kernel` [grid] on `device`, that of the operands.

    Triton launches on the current device, whatever its operands are on: under `device_map` that is another one.
    """
    guard = nullcontext()
    if device.type == "cuda":
        import torch

        if device.index != torch.cuda.current_device():
            guard = torch.cuda.device(device)

    def run():
        return kernel[grid](*args, **options)

    observer = getattr(_observed, "by", None)
    with guard:
        if observer is None:
            run()
        else:
            observer(kernel, grid, args, options, run)


@contextmanager
def observed(observer: Callable) -> Iterator[None]:
    """Inside, in this thread, `observer` is called in place of every launch: with the kernel, its grid, arguments and
    options, and the launch itself, which gives Triton's compiled kernel (None in the interpreter)."""
    before, _observed.by = getattr(_observed, "by", None), observer
    try:
        yield
    finally:
        _observed.by = before


def current_stream() -> int:
    """Of the current device, as a compiled kernel takes it."""
    from triton.runtime import driver

    return driver.active.get_current_stream(driver.active.get_current_device())


def forget() -> None:
    """Forgets which tiles were made smaller, for another device in place of this one."""
    _fitting.clear()


@contextmanager
def exact_tiles() -> Iterator[None]:
    """Inside, a tile that does not fit is an error instead of a smaller one's launch: for measurements of tiles."""
    global _exact
    before, _exact = _exact, True
    try:
        yield
    finally:
        _exact = before


def fitted(footprint: "shared_memory.Footprint", tile: Tile, device, attempt: Callable[[Tile], _Result]) -> _Result:
    """attempt(tile), or of the first smaller tile whose launch the device can hold.

    footprint: what the launch keeps in shared memory, by tile; attempt: everything that depends on the tile, the launch
    last.

    Raises:
        OutOfResources: the smallest tile is too large too, or `exact_tiles` forbids another one.
    """
    if _exact:
        return attempt(tile)
    key = (footprint, device, tile)
    chosen = _fitting.get(key)
    if chosen is None:
        chosen = _fitting[key] = shared_memory.fit(footprint, tile, shared_memory.limit_of(device))
    while True:
        try:
            return attempt(chosen)
        except OutOfResources as fault:
            following = smaller(chosen)
            if following is None:
                raise
            _logger.warning("%s: %s does not fit %s (%s); %s runs instead", footprint, chosen, device, fault, following)
            chosen = _fitting[key] = following

"""Where a launch runs and with which tile, on a stand-in for a machine with two GPUs of little shared memory."""

import contextlib
import logging

import pytest
import torch
from mmpeft_kernels import launch as launching
from mmpeft_kernels import shared_memory
from mmpeft_kernels.launch import exact_tiles, fitted, launch
from mmpeft_kernels.lowrank_gemm import GemmTile
from mmpeft_kernels.shared_memory import LIMITS, Footprint, fit
from mmpeft_kernels.tile import Tile, architecture, assumed_architecture, smaller
from triton.runtime.errors import OutOfResources

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
LARGE = Tile(block_m=64, block_n=128, num_warps=8, num_stages=3)


class Machine:
    """Two GPUs: the current one, and where and with what every kernel ran."""

    current = 0

    def __init__(self, shared_bytes=LIMITS[90]):
        self.ran, self.shared_bytes, self.switches = [], shared_bytes, 0

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        self.switches += 1
        try:
            yield
        finally:
            self.current = before

    def __getitem__(self, grid):  # a kernel: kernel[grid](...)
        def run(*args, shared=0, **options):
            if shared > self.shared_bytes:
                raise OutOfResources(shared, self.shared_bytes, "shared memory")
            self.ran.append((self.current, grid, args, options))

        return run


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(shared_memory, "limit_of", lambda device: machine.shared_bytes)
    monkeypatch.setattr(launching, "_fitting", {})
    return machine


def test_a_launch_runs_on_its_operands_device(machine):
    launch(machine, (3,), SECOND, "x", BLOCK=16)
    assert machine.ran == [(1, (3,), ("x",), {"BLOCK": 16})]
    assert machine.current == 0
    machine.current = 1
    launch(machine, (1,), FIRST)
    assert [where for where, *_ in machine.ran] == [1, 0] and machine.current == 1


def test_the_current_device_is_not_set_again(machine):
    launch(machine, (1,), FIRST)
    launch(machine, (1,), torch.device("cpu"))
    assert machine.switches == 0 and len(machine.ran) == 2


def test_the_device_is_given_back_after_a_failure(machine):
    with pytest.raises(OutOfResources):
        launch(machine, (1,), SECOND, shared=machine.shared_bytes + 1)
    assert machine.current == 0


def test_no_kernel_is_launched_past_the_guard():
    """`kernel[grid](...)` stands in one place."""
    import ast
    from pathlib import Path

    folder = Path(launching.__file__).parent
    found = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value)
                if name == "kernel" or name.endswith("_kernel"):
                    found.append((path.name, name))
    assert found == [("launch.py", "kernel")]


def test_a_tile_that_cannot_fit_is_made_smaller_before_anything_runs(machine):
    footprint, tried = Footprint("dy_pass", 89, 2, 128), []
    machine.shared_bytes = footprint.bytes(LARGE) - 1
    fitted(footprint, LARGE, FIRST, tried.append)
    (tile,) = tried
    assert tile != LARGE and footprint.bytes(tile) <= machine.shared_bytes


def test_what_the_compiler_finds_too_large_falls_once_and_is_remembered(machine, caplog):
    footprint, tried = Footprint("dy_pass", 90, 2, 16), []

    def attempt(tile):
        tried.append(tile)
        launch(machine, (1,), FIRST, shared=machine.shared_bytes + 1 if tile == LARGE else 0)
        return tile

    with caplog.at_level(logging.WARNING):
        first, second = (fitted(footprint, LARGE, FIRST, attempt) for _ in range(2))
    assert first == second == smaller(LARGE)
    assert tried == [LARGE, first, first]
    assert len(caplog.records) == 1 and "does not fit cuda:0" in caplog.text
    other = fitted(footprint._replace(block_r=32), LARGE, FIRST, lambda tile: tile)
    assert other == LARGE == fitted(footprint, LARGE, SECOND, lambda tile: tile)


def test_the_smallest_tile_that_does_not_fit_is_an_error(machine):
    def attempt(tile):
        raise OutOfResources(1, 0, "shared memory")

    with pytest.raises(OutOfResources):
        fitted(Footprint("ddown", 90, 2, 16), LARGE, FIRST, attempt)


def test_measurements_of_tiles_take_no_other(machine):
    footprint = Footprint("dy_pass", 89, 2, 128)
    machine.shared_bytes = footprint.bytes(LARGE) - 1
    with exact_tiles():
        assert fitted(footprint, LARGE, FIRST, lambda tile: tile) == LARGE
    assert fitted(footprint, LARGE, FIRST, lambda tile: tile) != LARGE


@pytest.mark.parametrize("tile", [LARGE, GemmTile(block_m=128, block_n=256, block_k=64, num_stages=4, use_tma=True)])
def test_smaller_tiles_end_and_shrink(tile):
    footprint = Footprint("lowrank_gemm" if isinstance(tile, GemmTile) else "dy_pass", 90, 2, 128)
    seen = [tile]
    while (following := smaller(seen[-1])) is not None:
        seen.append(following)
    sizes = [footprint.bytes(tile) for tile in seen]
    assert sizes == sorted(sizes, reverse=True) and len(seen) == len(set(seen)) < 20
    assert {type(tile) for tile in seen} == {type(tile)}
    assert fit(footprint, tile, None) == tile
    assert fit(footprint, tile, 0) == seen[-1]


def test_architecture_of_no_gpu_can_be_assumed():
    meta = torch.device("meta")
    assert architecture(meta) == 80
    with assumed_architecture("gfx942"):
        assert architecture(meta) == "gfx942" and shared_memory.limit_of(meta) == 64 * 1024
    assert architecture(meta) == 80


def test_limit_is_the_devices_own_where_it_says_so(monkeypatch):
    class Properties:
        shared_memory_per_block_optin = 12345

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert shared_memory.limit_of(FIRST) == 12345
    del Properties.shared_memory_per_block_optin
    monkeypatch.setattr(shared_memory, "architecture", lambda device: 89)
    assert shared_memory.limit_of(FIRST) == 99 * 1024
    monkeypatch.setattr(shared_memory, "architecture", lambda device: 75)
    assert shared_memory.limit_of(FIRST) is None

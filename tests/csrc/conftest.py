"""Tests of the native extension: skipped with the reason where it was not built, run for each instruction set."""

import pytest
import torch

from mmpeft_fast.ops import csrc


def pytest_collection_modifyitems(items):
    reason = csrc.why_unavailable()
    if reason is not None:
        for item in items:
            if "tests/csrc/" in item.path.as_posix() and "needs_no_extension" not in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc):
    if "instruction_set" in metafunc.fixturenames:
        names = ["none"] if csrc.why_unavailable() else csrc.extension().instruction_sets()
        metafunc.parametrize("instruction_set", names, indirect=True)


@pytest.fixture
def instruction_set(request):
    """Runs the test's kernels on one instruction set."""
    module = csrc.extension()
    before = module.instruction_set()
    module.use_instruction_set(request.param)
    yield request.param
    module.use_instruction_set(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request):
    return getattr(torch, request.param)

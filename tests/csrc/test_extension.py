"""Whether the extension is there, and one line on why it is not."""

import re
import types

import pytest
import torch

from mmpeft_fast.ops import csrc, kernels_cpu


@pytest.fixture
def importing(monkeypatch):
    """Lets the extension's import return or raise what a test gives."""

    def use(result):
        def import_module(name):
            assert name == "mmpeft_fast._C"
            if isinstance(result, Exception):
                raise result
            return result

        monkeypatch.setattr(csrc.importlib, "import_module", import_module)
        csrc._loaded.cache_clear()

    yield use
    csrc._loaded.cache_clear()


@pytest.mark.parametrize(
    "result, message",
    [
        (ModuleNotFoundError("No module named 'mmpeft_fast._C'"), "was not built; run: pip install"),
        (
            ImportError("undefined symbol: _ZN3c10\nmore"),
            r"does not load \(undefined symbol: _ZN3c10\); build it again",
        ),
        (
            types.SimpleNamespace(torch_version="1.0"),
            re.escape(f"was built for torch 1.0, this is {torch.__version__}"),
        ),
    ],
)
def test_needs_no_extension_to_say_why_it_is_missing(importing, result, message):
    importing(result)
    with pytest.raises(RuntimeError, match=message):
        csrc.extension()
    assert "\n" not in csrc.why_unavailable()
    assert kernels_cpu.unsupported(torch.ones(1)) == csrc.why_unavailable()


def test_what_the_provider_cannot_run():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels_cpu.unsupported(torch.ones(1, dtype=dtype)) is None
    assert kernels_cpu.unsupported(torch.ones(1, dtype=torch.float64)) == "float64"
    assert kernels_cpu.unsupported(torch.ones(1, device="meta")) == "tensors on meta"

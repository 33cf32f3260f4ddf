"""Choosing a provider; what the Triton provider computes is checked in tests/kernels, in the interpreter."""

import pytest

import mmpeft_fast
from mmpeft_fast.ops import providers
from mmpeft_fast.ops.providers import chosen_provider, provider_report


def test_torch_unless_forced(monkeypatch):
    assert chosen_provider() == "torch"
    monkeypatch.setattr(providers, "triton_is_installed", lambda: True)
    with mmpeft_fast.provider("triton"):
        assert chosen_provider() == "triton"
        with mmpeft_fast.provider("torch"):
            assert chosen_provider() == "torch"
        assert chosen_provider() == "triton"
    assert chosen_provider() == "torch"


def test_errors(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"expected one of \['torch', 'triton'\], got 'cuda'"),
        mmpeft_fast.provider("cuda"),
    ):
        pass
    monkeypatch.setattr(providers, "triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match="got 'triton'; run: pip install triton"), mmpeft_fast.provider("triton"):
        pass
    assert chosen_provider() == "torch"


@pytest.mark.parametrize("installed", [True, False])
def test_report_says_what_is_unproven(monkeypatch, installed):
    monkeypatch.setattr(providers, "triton_is_installed", lambda: installed)
    report = {op: (name, reason) for op, name, reason in provider_report()}
    assert {name for name, _ in report.values()} == {"torch"}
    assert ("unproven" in report["fused_linear"][1]) == installed

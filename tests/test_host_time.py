"""Host time of a fused layer on a GPU, measured without one: `bench.host`."""

import pytest
import triton

from bench import host

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is launched")


def test_a_fused_layer_takes_the_host_less_than_hf_peft():
    """The row says 0.8; the least of many rounds in one process is asked for no more than 1.1, whatever else runs."""
    found = host.layer_times(rounds=15)
    assert found["launches"] == 32
    assert found["fused_ms"] < 1.1 * found["peft_ms"], found


def test_the_stub_leaves_nothing_behind():
    from triton.runtime import driver

    from mmpeft_fast.ops import dispatch, tape

    before = driver._active, dispatch.is_gpu, dispatch.table_of
    with host.stub_gpu():
        assert dispatch.is_gpu is not before[1]
    assert (driver._active, dispatch.is_gpu, dispatch.table_of) == before
    assert not tape._tapes


def test_a_gpu_without_a_table_is_said():
    with (
        pytest.raises(ValueError, match="expected a GPU with a committed table, got 'abacus'"),
        host.stub_gpu("abacus"),
    ):
        pass

"""Host time of a fused layer on a GPU, measured without one: `bench.host`."""

import pytest
import triton

from bench import host, step
from mmpeft_fast import METHODS, add_peft, fuse, make_method
from mmpeft_fast.ops import tape
from tests.tiny_models import small_settings

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is launched")


def test_a_fused_layer_takes_the_host_less_than_hf_peft():
    """The row says 0.8; the least of many rounds in one process is asked for no more than 1.1, whatever else runs."""
    found = host.layer_times(rounds=15)
    assert found["launches"] == 32
    assert found["fused_ms"] < 1.1 * found["peft_ms"], found


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_call_of_a_step_is_taped(method):
    """And launches as many compiled kernels from tapes as without."""
    small = "--hidden 64 --intermediate 96 --layers 3 --heads 2 --kv-heads 1 --vocab 50 --seq-len 64 --supervised 0.3"
    args = step.parse([*small.split(), "--dtype", "bf16"])
    counts = []
    with host.stub_gpu() as stub:
        model = fuse(add_peft(step.decoder(args), make_method(method, **small_settings(method, dropout=0.1)))).train()
        batch = step.inputs(args)
        for _ in range(4):
            before = stub.launches
            step.step(model, batch)
            counts.append(stub.launches - before)
        tapes = list(tape._tapes.values())
        assert len(tapes) >= 8 * 3 and all(map(callable, tapes))
    assert len(set(counts)) == 1


def test_the_stub_leaves_nothing_behind():
    from triton.runtime import driver

    from mmpeft_fast.ops import dispatch

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

"""Memory over time: roles, peaks, and agreement with `measure.peak_bytes`."""

import gc

import pytest
import torch
from torch import nn

import mmpeft_fast
from mmpeft_fast import METHODS, fuse, make_method, peak_bytes
from mmpeft_fast.peft_model import add_peft
from mmpeft_fast.profiling.storages import ROLES, Storages, Timeline
from mmpeft_fast.stored.baseline import add_baseline
from tests.tiny_models import tiny_batch, tiny_model

MOST_OFF = 0.05  # of the peak


def test_a_storage_has_the_role_of_what_it_becomes():
    storages = Storages()
    weight, y = torch.zeros(10), torch.zeros(5)
    storages.see([weight], "parameters", before=True)
    storages.position = 3
    storages.see([y])
    storages.see([y[1:]], "saved for backward")  # the same storage
    storages.see([weight], "saved for backward")  # stays a parameter
    del y
    timeline = storages.timeline()
    assert timeline.positions == [0, 3, 3]
    as_dicts = [dict(zip(ROLES, point, strict=True)) for point in timeline.bytes]
    assert [point["parameters"] for point in as_dicts] == [40, 40, 40]
    assert [point["saved for backward"] for point in as_dicts] == [0, 20, 0]
    assert timeline.peak_idx == 1 and timeline.peak_bytes == 60


def test_after_close_nothing_is_followed():
    storages = Storages()
    x = torch.zeros(7)
    storages.see([x])
    storages.close()
    del x
    assert storages.timeline().bytes[-1][ROLES.index("other")] == 28


@pytest.mark.parametrize("num_points", [1, 7, 33])
def test_thinning_keeps_the_peak(num_points):
    sizes = [(i * 37) % 101 for i in range(130)]
    timeline = Timeline(list(range(130)), [(0, 0, 0, 0, size) for size in sizes])
    thin = timeline.thinned(num_points)
    assert len(thin.positions) == len(thin.bytes) == num_points
    assert thin.peak_bytes == timeline.peak_bytes == max(sizes)
    assert timeline.thinned(130) is timeline


@pytest.mark.parametrize("implementation", ["peft", "fused"])
@pytest.mark.parametrize("method", METHODS)
def test_the_peak_is_that_of_peak_bytes(method, implementation):
    model = tiny_model("llava", num_layers=2)
    if implementation == "peft":
        model, _ = add_baseline(model, make_method(method))
    else:
        model = fuse(add_peft(model, make_method(method)))
    model.train()
    batch = tiny_batch("llava", batch_size=2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    holder = nn.Module()
    holder.model = model
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    for i, tensor in enumerate(states):
        holder.register_buffer(f"state_{i}", tensor)
    gc.collect()
    with peak_bytes("cpu", holder) as peak:
        step()
    with mmpeft_fast.profile(model) as p:
        step()
    assert p.timeline.peak_bytes == pytest.approx(peak.bytes, rel=MOST_OFF)
    last = dict(zip(ROLES, p.timeline.bytes[-1], strict=True))
    assert last["optimizer states"] == sum(tensor.untyped_storage().nbytes() for tensor in states)
    assert last["saved for backward"] == 0 and last["gradients"] == 0
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    assert last["parameters"] == sum(held.values())

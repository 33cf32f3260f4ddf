"""Sweeps, charts, and the answers beside a plan."""

import csv
import dataclasses
import io
from xml.etree import ElementTree

import pytest

from mmpeft_fast.pages.svg import ticks
from mmpeft_fast.plan import advice
from mmpeft_fast.plan.charts import sweep_html, sweep_svg
from mmpeft_fast.plan.devices import device_named
from mmpeft_fast.plan.prediction import plan
from mmpeft_fast.plan.request import Request
from mmpeft_fast.plan.sweep import as_csv, axis, points, rows_of, swept
from tests.plan.real_step import TINY_IMAGE


def request(folder: str, **fields) -> Request:
    plain = {"batch_size": 2, "seq_len": 128, "image_size": TINY_IMAGE, "settings": {"r": 8}}
    return Request(model=folder, **(plain | fields))


PEAKS = {
    "line": lambda value: 10.0 + 3.0 * value,
    "bend up": lambda value: 10.0 + 0.01 * value**2,
    "bend down": lambda value: 10.0 + 40.0 * value**0.5,
    "steps": lambda value: 10.0 + 64.0 * (value // 64),
    "flat": lambda value: 10.0,
}


@pytest.mark.parametrize("shape", PEAKS)
@pytest.mark.parametrize("known", [1, 7, 130])
def test_the_search_finds_the_limit(shape, known):
    peak = PEAKS[shape]
    for room in (0.0, 10.0, 13.0, 14.5, 100.0, 399.0, 1e9):
        tried = []

        def counted(value, tried=tried):
            tried.append(value)
            return peak(value)

        expected = max((value for value in range(1, 501) if peak(value) <= room), default=0)
        found = advice.largest_that_fits(counted, room, known=(known, peak(known)), low=1, most=500)
        assert found == expected
        assert len(set(tried)) == len(tried) and len(tried) <= 40
        assert all(1 <= value <= 500 for value in tried)


def test_a_line_needs_few_trials():
    tried = []
    found = advice.largest_that_fits(
        lambda value: tried.append(value) or 1000.0 + 3.0 * value, 1300.0, known=(4, 1012.0), low=1, most=4096
    )
    assert found == 100 and len(tried) <= 4


def test_largest_batch_and_length_are_the_largest(tiny_folders):
    small = plan(request(tiny_folders["llava"]), device_named("h100"))
    room = small.counts.peak_bytes * 5 // 4
    tight = dataclasses.replace(small.device, memory_bytes=room, reserve_bytes=0)
    planned = dataclasses.replace(small, device=tight)
    batch = advice.largest_batch(planned)
    assert batch > 2

    def fits(**fields):
        return plan(dataclasses.replace(planned.request, **fields), tight).fits

    assert fits(batch_size=batch) and not fits(batch_size=batch + 1)
    length = advice.largest_length(planned)
    assert length > 128 and length % 64 == 0
    assert fits(seq_len=length) and not fits(seq_len=length + 64)


def test_nothing_fits_a_device_smaller_than_the_weights(tiny_folders):
    small = plan(request(tiny_folders["llava"]), device_named("h100"))
    tiny = dataclasses.replace(small.device, memory_bytes=small.counts.weight_bytes, reserve_bytes=0)
    planned = dataclasses.replace(small, device=tiny)
    assert not planned.fits
    assert advice.largest_batch(planned) == 0 and advice.largest_length(planned) == 0


def test_changes_are_in_the_order_of_what_is_short(tiny_folders):
    planned = plan(request(tiny_folders["llava"], implementation="peft"), device_named("a100-40"))
    by_time = advice.changes(planned)
    assert {change.name for change in by_time} == {
        "activation checkpointing", "half the r", "implementation fused", "cached vision features",
    }  # fmt: skip
    assert [change.seconds for change in by_time] == sorted(change.seconds for change in by_time)
    cramped = dataclasses.replace(planned, device=dataclasses.replace(planned.device, memory_bytes=1))
    by_memory = advice.changes(cramped)
    assert [change.peak_bytes for change in by_memory] == sorted(change.peak_bytes for change in by_memory)
    assert by_memory[0].peak_bytes < 0


def test_axes_are_read():
    assert axis("batch-size=1,2", int) == ("batch_size", (1, 2))
    for text in ("batch_size", "batch_size=", "=1", "batch_size=,"):
        with pytest.raises(ValueError, match="--sweep: expected NAME=VALUE"):
            axis(text, int)


def test_points_are_the_product_and_reach_settings_and_device():
    base = Request(model="llava-1.5-7b")
    found = list(points(base, "h100", [("batch_size", (1, 2)), ("r", (8, 16)), ("device", ("cpu",))]))
    assert [(p.batch_size, p.settings["r"], device) for _, p, device in found] == [
        (1, 8, "cpu"), (1, 16, "cpu"), (2, 8, "cpu"), (2, 16, "cpu"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="expected every name once"):
        list(points(base, "h100", [("r", (8,)), ("r", (16,))]))
    with pytest.raises(ValueError, match="batch_size: expected an integer of 1 to 1048576, got 0"):
        list(points(base, "h100", [("batch_size", (1, 0))]))
    with pytest.raises(ValueError, match="no setting"):
        list(points(base, "h100", [("rank", (8,))]))


def test_a_sweep_as_csv_and_charts(tiny_folders):
    plans = swept(request(tiny_folders["llava"]), "h100", [("batch_size", (1, 2)), ("method", ("lora",))])
    rows = rows_of(plans)
    assert [int(row["batch_size"]) for row in csv.DictReader(io.StringIO(as_csv(rows)))] == [1, 2]
    assert rows[0]["peak_bytes"] < rows[1]["peak_bytes"]
    svg = sweep_svg(rows, ["batch_size", "method"], title="a < b", memory_bytes=1 << 30)
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == "a < b"
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 3 and all(len(line.attrib["points"].split()) == 2 for line in lines)
    page = sweep_html(svg, "a < b", "1 < 2")
    assert svg in page and "1 &lt; 2" in page
    with pytest.raises(ValueError, match="--plot: expected a swept name with numbers"):
        sweep_svg(rows, ["method"], title="", memory_bytes=None)


@pytest.mark.parametrize("high", [0.003, 1.0, 7.3, 99.0, 1e6])
def test_ticks_are_round_and_cover_the_values(high):
    found = ticks(0.0, high)
    assert found[0] == 0 and found[-1] >= high > found[-2] and 2 <= len(found) <= 7

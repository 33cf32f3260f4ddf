"""The page and its charts: well-formed, to scale, and harmless whatever names they get."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from mmpeft_fast.pages.bars import stacked_bars
from mmpeft_fast.pages.svg import readable
from mmpeft_fast.profiling.charts import memory_areas
from mmpeft_fast.profiling.measured import Measured, comparisons
from mmpeft_fast.profiling.report import report_html
from mmpeft_fast.profiling.rows import OUTSIDE, Row, by_part, total
from mmpeft_fast.profiling.storages import ROLES, Timeline
from mmpeft_fast.profiling.text import comparison_text

HOSTILE = "<b>\"&'</b>"
REQUEST = {
    "what": "step", "model": HOSTILE, "method": "lora", "settings": {"r": 7}, "layers": None, "dtype": "bf16",
    "batch_size": 1, "seq_len": 33, "device_name": HOSTILE, "threads": 2,
}  # fmt: skip
NOTHING = Timeline([], [])
VOID = {"meta", "rect", "line", "circle", "polygon", "br"}


def row(part: str, op: str, seconds: float, ideal: float | None = 0.5) -> Row:
    return Row(
        part=part, op=op, phase="forward", calls=1, launches=3, seconds=seconds, flops=10, bytes=7, ideal_seconds=ideal
    )


def measured(name: str, times_s=(3.0, 9.0, 4.0), rows=(), timeline=NOTHING) -> Measured:
    return Measured(name=name, origin=HOSTILE, times_s=times_s, rows=list(rows), timeline=timeline, trace="{}")


class _Balance(HTMLParser):
    """Fails where a tag is closed that is not the last one opened."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open.pop() == tag, tag


def check_page(page: str) -> None:
    parser = _Balance()
    parser.feed(page)
    assert parser.open == []
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(svg)
    assert HOSTILE not in page and "<script" not in page and "nan" not in page


def test_a_page_of_hostile_names_is_whole():
    timeline = Timeline([0, 1, 2], [(5, 0, 0, 0, 0), (5, 1, 2, 3, 4), (5, 0, 0, 0, 0)], ((0, "forward"),))
    rows = [row("gemms", HOSTILE, 2.0), row(OUTSIDE, HOSTILE, 1.0)]
    one, other = measured("peft", rows=rows, timeline=timeline), measured("fused", rows=rows, timeline=timeline)
    check_page(report_html([one, other], REQUEST, None))
    check_page(report_html([one], {"what": HOSTILE, "model": "–"}, None))
    assert "fused/peft" in comparison_text([one, other], REQUEST)


def test_a_page_of_nothing_is_whole():
    page = report_html([measured("code"), measured("fused")], REQUEST, None)
    check_page(page)
    assert comparisons([measured("peft"), measured("fused")])["fused/peft"]["launches"] is None


def test_ratios_are_of_medians():
    fast, slow = measured("fused", times_s=[1.0, 100.0, 2.0]), measured("peft", times_s=[4.0, 4.0, 0.1])
    assert comparisons([slow, fast])["fused/peft"]["time"] == 0.5


def test_parts_come_in_their_order_and_unknown_rooflines_stay_unknown():
    rows = [row("head", "mm", 1.0), row("vision", "mm", 2.0, ideal=None), row("head", "add", 3.0)]
    parts = by_part(rows)
    assert [(part.part, part.seconds, part.launches) for part in parts] == [("vision", 2.0, 3), ("head", 4.0, 6)]
    assert [part.roofline_fraction for part in parts] == [None, 0.25]
    assert total(rows).roofline_fraction is None
    assert total([]).roofline_fraction is None and total([]).seconds == 0


def test_bars_are_to_scale():
    svg = ElementTree.fromstring(stacked_bars("t", {"a": {"gemms": 1.0, "head": 3.0}, "b": {"gemms": 2.0}}, "ms"))
    first, second, third = (float(rect.get("width")) for rect in svg.iter("rect"))
    assert second == pytest.approx(3 * first, abs=0.02) and third == pytest.approx(2 * first, abs=0.02)
    assert ElementTree.fromstring(stacked_bars("t", {"a": {}}, "ms")).findall("rect") == []


def test_areas_stack_up_to_the_peak():
    mib = 2**20
    timeline = Timeline([0, 1, 9], [(8 * mib, 0, 0, 0, 0), (8 * mib, 0, 0, 4 * mib, 0), (8 * mib, 0, 0, 0, 0)])
    svg = ElementTree.fromstring(memory_areas("fused", timeline, 16 * mib))
    areas = {area.get("class"): area for area in svg.iter("polygon")}
    assert list(areas) == ["parameters", "saved-for-backward"]
    heights = {
        name: [float(corner.split(",")[1]) for corner in area.get("points").split()] for name, area in areas.items()
    }
    floor = max(heights["parameters"])
    weights, peak = floor - min(heights["parameters"]), floor - min(heights["saved-for-backward"])
    assert peak == pytest.approx(1.5 * weights, abs=0.2)
    assert float(svg.find("circle").get("cy")) == pytest.approx(min(heights["saved-for-backward"]), abs=0.1)
    assert "peak 12.0 MiB" in svg.get("aria-label") and ROLES[3] in svg.get("aria-label")
    assert ElementTree.fromstring(memory_areas("nothing", NOTHING, 0)).find("circle") is None


def test_numbers_are_never_exponents():
    assert [readable(value) for value in (0.0, 0.1234, 45.63, 99.96, 1387.8)] == ["0", "0.123", "45.6", "100", "1,388"]

"""The table, the charts and the page, from rows."""

import csv
import io
import itertools
import re
import statistics
from dataclasses import asdict
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from mmpeft_fast.pages.points import Point, best_points, points_chart
from mmpeft_fast.study.cells import StudyConfig, cell_name, plan
from mmpeft_fast.study.charts import ratio_chart, sparkline
from mmpeft_fast.study.report import report_html, write_report
from mmpeft_fast.study.table import COLUMNS, count, memory_ratio, terminal_table, time_ratio
from tests.study.conftest import measured

VOID = {"meta"}


class Page(HTMLParser):
    """Reads a page: its text, its tags, and whether they close in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def count(self, tag: str, **attributes) -> int:
        wanted = attributes.items()
        return sum(name == tag and wanted <= found.items() for name, found in self.tags)


def test_the_page_is_whole_and_needs_nothing_from_outside(rows):
    html = report_html(rows)
    page = Page(html)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags} and page.count("script") == 1
    assert not [attributes for _, attributes in page.tags if {"src", "srcset"} & attributes.keys()]
    assert all(found["href"].startswith("data:text/csv") for _, found in page.tags if "href" in found)
    assert not re.search(r"https?:|url\(|@import", html)
    assert "prefers-color-scheme: dark" in html


def test_the_page_has_charts_for_each_model_and_all_rows(rows, config):
    page = Page(report_html(rows))
    assert page.count("figure") == 3 * len(config.models)
    bars = [(model, method, bar) for model in config.models for method in config.methods for bar in ("peft", "fused")]
    assert page.count("rect", **{"class": "fused"}) == 3 * len(bars) // 2
    assert page.count("rect", **{"class": "peft"}) == 3 * (len(bars) // 2 - 1)  # one cell failed
    assert page.text.count("peft: no number") == 3
    assert page.count("tr") == 1 + len(rows)
    assert page.count("details") == len(rows)
    assert all(row["command"] in page.text for row in rows)


def test_the_csv_has_every_row_and_number(rows):
    link = next(found["href"] for tag, found in Page(report_html(rows)).tags if tag == "a")
    table = list(csv.DictReader(io.StringIO(unquote(link.partition(",")[2]))))
    assert [line["command"] for line in table] == [row["command"] for row in rows]
    assert [line["step_ms_p50"] for line in table] == [
        "" if (ms := row["step_ms_p50"]) is None else str(ms) for row in rows
    ]


def test_rows_are_sorted_by_numbers_as_they_are(rows):
    keys = [found.get("data-key") for tag, found in Page(report_html(rows)).tags if tag == "td"]
    assert "312320" in keys and "312 k" not in keys


@pytest.fixture
def varied(tmp_path) -> list[dict]:
    """Rows of all cells of three methods on one model; accuracies differ from cell to cell."""
    methods = ("lora", "prefix", "adapter")
    _, cells = plan(StudyConfig(output=tmp_path, models=("tiny-llava",), methods=methods))
    rows = []
    for number, cell in enumerate(cells):
        row = {"spec_key": cell.key, "reason": None, "elapsed_s": 1.0, "command": "again", **measured(), **asdict(cell)}
        row |= {"accuracy": number / len(cells), "trainable_params": 1000 + number, "peak_mib": 60.0 + number % 7}
        row |= {"loss_first": 2.0, "loss_last": 1.0, "tokens_per_s": 9e3 + number, "device_name": "a CPU"}
        rows.append(row | {"versions": {"torch": "2"}, "time": "2026-01-01T00:00:00+00:00"})
    return rows


def test_sections_of_what_is_varied(varied):
    page = Page(report_html(varied))
    titles = ("Accuracy and what", "New and known", "Location", "Size and samples", "Stability", "The papers beside")
    assert all(title in page.text for title in titles)
    by_name = {cell_name(row): 100 * row["accuracy"] for row in varied}
    assert f"{by_name['tiny-llava adapter fused location mlp']:.1f}" in page.text
    seeds = [by_name[f"tiny-llava prefix fused{seed}"] for seed in (" seed 21", " seed 63", "")]
    assert f"{statistics.fmean(seeds):.1f} ± {statistics.stdev(seeds):.1f}" in page.text
    assert page.count("circle", **{"class": "point"}) == 2 * 3 + 3 * 3  # methods in two charts, seeds in one
    assert page.count("figure") == 3 + 2 + 2 + 1
    assert "different settings" not in page.text  # of other seeds among what is varied


def test_sections_without_their_rows_are_left_out(varied):
    page = Page(report_html([row for row in varied if row["axis"] in ("", "seed")]))
    assert "Stability" in page.text and "Location of" not in page.text and "Size and samples" not in page.text


def test_best_points_are_those_that_no_other_beats():
    points = [Point("a", 1, 5), Point("b", 2, 4), Point("c", 3, 9), Point("d", 3, 7), Point("e", 2, 5)]
    assert [point.name for point in best_points(points, less_is_better=True)] == ["a", "c"]
    assert [point.name for point in best_points(points, less_is_better=False)] == ["c"]


@pytest.mark.parametrize("xs", [[50.0] * 6, [50.0, 50.2, 50.4, 50.5, 50.9, 60.0]])
@pytest.mark.parametrize("ys", [[0.0] * 6, [100.0] * 6, [5.0, 5.1, 5.2, 5.3, 5.4, 96.0]])
def test_points_and_their_names_stay_in_the_picture_and_apart(xs, ys):
    names = ("layernorm-simp", "lora", "ia3", "prefix", "adapter", "layernorm")
    chart = points_chart("t", list(map(Point, names, xs, ys)), "MiB", "%", less_is_better=True)
    found = re.findall(
        r'class="value" x="([-.0-9]+)" y="([-.0-9]+)" dy=".35em" text-anchor="(start|end)">([^<]+)', chart
    )
    boxes = []
    for x, y, anchor, name in found:
        left = float(x) - (7 * len(name) if anchor == "end" else 0)
        boxes.append((left, left + 7 * len(name), float(y)))
        assert left >= 0 and left + 7 * len(name) <= 420 and -40 <= float(y) <= 300
    assert len(boxes) == 6
    for (left, right, y), (other_left, other_right, other_y) in itertools.combinations(boxes, 2):
        assert right <= other_left or other_right <= left or abs(y - other_y) > 12


def test_the_page_tells_failures_as_text(rows):
    html = report_html(rows)
    assert "expected &lt;this&gt;, got that" in html and "<this>" not in html
    assert f"1 of {len(rows)} cells failed" in Page(html).text


def test_the_page_warns_of_rows_that_cannot_be_compared(rows):
    assert "different settings" not in Page(report_html(rows)).text
    mixed = [{**row, "steps": 99} if index == 1 else row for index, row in enumerate(rows)]
    assert "These rows come from 2 different settings" in Page(report_html(mixed)).text


@pytest.mark.parametrize("left_out", ["frozen", "peft", "fused"])
def test_the_page_does_without_some_implementations(rows, left_out):
    page = Page(report_html([row for row in rows if row["implementation"] != left_out]))
    assert page.count("figure") == (2 if left_out == "frozen" else 6)  # no frozen row: only the ratio of times


def test_the_page_of_failures_alone(rows):
    failed = [row for row in rows if row["status"] == "failed"]
    page = Page(report_html(failed))
    assert page.count("tr") == 2 and "1 of 1 cells failed" in page.text


def test_writing_replaces_an_old_report(rows, tmp_path):
    path = write_report(rows[:3], tmp_path)
    write_report(rows, tmp_path)
    assert path.read_text() == report_html(rows)
    assert [file.name for file in tmp_path.iterdir() if file.name != "out"] == ["report.html"]


def test_ratios_relate_to_the_frozen_model(rows):
    frozen, peft = rows[0], rows[1]
    assert (time_ratio(frozen), time_ratio(peft)) == (1.0, 2.0)
    assert memory_ratio(peft, frozen, "saved_mib") == 2.0
    assert memory_ratio(peft, None, "saved_mib") is None


def test_the_terminal_table_is_aligned_and_names_failures(rows):
    lines = terminal_table(rows).splitlines()
    body = lines[: lines.index("", lines.index("") + 1)]  # two models, then the failures
    starts = [body[0].index(column.title) for column in COLUMNS if not column.is_number]
    for line in filter(None, body[2:]):
        assert all(start == 0 or line[start - 1] == " " != line[start] for start in starts)
    assert lines[-1] == "failed: tiny-qwen2-vl ia3 peft: ValueError: expected <this>, got that"


def test_cells_that_fail_for_one_reason_share_a_line(rows):
    failed = [{**row, "status": "failed", "reason": "no luck"} for row in rows[:3]]
    assert terminal_table(failed).splitlines()[-1] == "failed: tiny-llava frozen and 2 more: no luck"


@pytest.mark.parametrize(
    "value, text", [(None, "–"), (0, "0"), (9999, "9999"), (12345, "12.3 k"), (3604672, "3.6 M"), (7.06e9, "7.06 G")]
)
def test_counts_read_well(value, text):
    assert count(value) == text


def test_bars_are_as_long_as_their_ratios():
    svg = ratio_chart("time", [("lora", [("peft", 2.0), ("fused", 0.5)])])
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[0] / widths[1] == 4.0
    line_x = float(re.search(r'<line [^>]*x1="([\d.]+)"', svg)[1])
    bar_x = float(re.search(r'<rect [^>]* x="([\d.]+)"', svg)[1])
    assert line_x - bar_x == widths[0] / 2
    assert "time, frozen is 1: lora peft 2.00; lora fused 0.50" in svg


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [3.0, 2.0, 1.0]])
def test_curves_stay_in_their_box(values):
    svg = sparkline(values)
    _, _, width, height = map(float, re.search(r'viewBox="([^"]+)"', svg)[1].split())
    points = [tuple(map(float, point.split(","))) for point in re.search(r'points="([^"]+)"', svg)[1].split()]
    assert len(points) == len(values)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # falling losses fall on the page

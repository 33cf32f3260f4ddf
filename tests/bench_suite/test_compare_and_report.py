"""A planted regression is found, noise is not one; the report shows what the rows have."""

import json
import random
import re
from html.parser import HTMLParser

import pytest

from bench.suite.bootstrap import ratio_of
from bench.suite.compare import compare, measured_rows
from bench.suite.report import html_page, markdown
from mmpeft_fast import cli

_MS = {"frozen": 10.0, "peft": 16.0, "fused": 11.0}


def rows(seed, *, factors=None, kept=None, machine=1.0, cases=("a", "b"), **fields):
    """Rows with 5 % of spread from round to round, which all implementations of a round share, and 1 % of their own."""
    draw = random.Random(seed)
    found = []
    for case in cases:
        shared = [machine * draw.gauss(1, 0.05) for _ in range(15)]
        for name, ms in _MS.items():
            times = [ms * (factors or {}).get(name, 1.0) * one * draw.gauss(1, 0.01) for one in shared]
            p20, p50, p80 = (sorted(times)[i] for i in (3, 7, 11))
            found.append(
                {
                    "op": "suite", "mode": "fwd_bwd", "case": case, "implementation": name, "status": "ok",
                    "rounds_ms": times, "p50_ms": p50, "p20_ms": p20, "p80_ms": p80, "noise": 0.02,
                    "saved_mib": 10.0 * (kept or {}).get(name, 1.0), "peak_mib": 20.0, "x_frozen": p50 / 10,
                    "x_peft": p50 / 16, "flops": 10**9, "bytes": 10**8, "error": 1e-6, "eager_error": 1e-6,
                    "dtype": "fp32", "model": "m", "method": "lora", "device": "a machine", "threads": 2,
                    "commit": "abc", "dirty": False, **fields,
                }
            )  # fmt: skip
    return found


def saved(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_an_interval_holds_the_ratio_and_narrows_with_rounds():
    draw = random.Random(0)
    widths = []
    for count in (5, 50):
        one, other = ([ms * draw.gauss(1, 0.03) for _ in range(count)] for ms in (12.0, 10.0))
        value, (low, high) = ratio_of(one, other)
        assert low < value < high and low < 1.2 < high
        widths.append(high - low)
    assert widths[1] < widths[0]
    assert ratio_of([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == (2.0, (2.0, 2.0))  # rounds that were slow were slow for both


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_regression_and_a_planted_one_is(seed):
    old = rows(seed)
    assert not any(one.is_worse for one in compare(old, rows(100 + seed)))
    assert not any(one.is_worse for one in compare(old, rows(100 + seed, machine=1.5)))  # another machine, all the same
    assert all(one.is_slower for one in compare(old, rows(100 + seed, machine=1.5), absolute=True))
    found = compare(old, rows(100 + seed, factors={"fused": 1.12}))
    assert {one.implementation for one in found if one.is_slower} == {"fused"}
    found = compare(old, rows(100 + seed, factors={"fused": 0.85}))
    assert {one.implementation for one in found if one.is_faster} == {"fused"} and not any(
        one.is_worse for one in found
    )


def test_more_bytes_and_refusals_are_regressions_and_missing_ones_are_not():
    old = rows(0)
    assert {one.implementation for one in compare(old, rows(1, kept={"fused": 1.01})) if one.is_worse} == {"fused"}
    new = rows(1)
    for row in new:
        if row["implementation"] == "fused":
            del row["rounds_ms"]
            row |= {"status": "refused" if row["case"] == "a" else "left out", "reason": "so"}
    assert [(one.case, one.what) for one in compare(old, new) if one.is_worse] == [("a", "refused: so")]


def test_the_exit_status_is_for_continuous_integration(tmp_path, capsys):
    old = saved(tmp_path / "old.jsonl", rows(0))
    same, worse = (
        saved(tmp_path / "same.jsonl", rows(1)),
        saved(tmp_path / "worse.jsonl", rows(1, factors={"fused": 1.3})),
    )
    assert cli.main(["bench", "compare", old, same]) == 0
    assert "none of 4 got worse beyond the noise" in capsys.readouterr().out
    assert cli.main(["bench", "compare", old, worse]) == 1
    out = capsys.readouterr().out
    assert out.count("SLOWER") == 2 and "2 of 4 got worse" in out
    other = saved(tmp_path / "other.jsonl", rows(1, cases=("c",)))
    for bad, said in (
        (other, "compare: expected files with cases in common"),
        (saved(tmp_path / "x.jsonl", [{"op": "step"}]), "got 1 other rows"),
        (saved(tmp_path / "y.jsonl", [3]), "got 1 other rows"),
        (saved(tmp_path / "w.jsonl", [{"op": "suite", "mode": "fwd_bwd", "p50_ms": 1.0}]), "got a row without case, d"),
        (str(tmp_path), "Is a directory"),
    ):
        assert cli.main(["bench", "compare", old, bad]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    (tmp_path / "z.jsonl").write_bytes(b"\xff\xfe\n")
    assert cli.main(["bench", "compare", old, str(tmp_path / "z.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.names, self.addresses = [], []

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]


def everything():
    sizes = {"batch_size": 1, "hidden": 64, "layers": 1, "rank": 4}
    found = rows(0) + [
        row
        for i, n in enumerate((8, 16, 32))
        for row in rows(i, cases=(f"g{n}",), machine=n, growth="tokens", seq_len=n, **sizes)
    ]
    found += [row for i in range(3) for row in rows(i, cases=(f"s{i}",), sweep=0, shape=i, seq_len=10 + i, **sizes)]
    missing = {"case": "a", "implementation": "liger", "status": "missing", "reason": "not installed: <liger>"}
    found.append({**found[0], **missing})
    for name in ("rounds_ms", "p50_ms"):
        del found[-1][name]
    found.append(
        {"op": "suite", "mode": "machine", "flops_per_s": {"fp32": 1e11}, "bytes_per_s": 1e10, "device": "a machine"}
    )
    found.append(
        {
            "op": "suite",
            "mode": "left out",
            "cases": 9,
            "left_out": {"time": 3},
            "unseen": ["method ia3"],
            "device": "a machine",
        }
    )
    return found


def test_the_report_shows_what_the_rows_have(tmp_path, capsys):
    path = saved(tmp_path / "rows.jsonl", everything())
    assert cli.main(["bench", "report", path, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in ("suite.md", "suite.html")]
    page, text = ((tmp_path / "out" / name).read_text() for name in ("suite.html", "suite.md"))
    tags = _Tags()
    tags.feed(page)
    assert not tags.addresses and "script" not in tags.names and tags.names.count("svg") >= 6
    for title in ("Growth", "Time over size", "Roofline", "Kept for the backward pass", "Random shapes", "Every case"):
        assert f"<h2>{title}" in page
    assert "nan" not in page and "&lt;liger&gt;" in page and "<liger>" not in page
    assert "time grows as tokens^1" in text and "not seen at all: method ia3" in text and "not installed" in text
    fused = rows(0)[2]
    assert f"| fused | {fused['p50_ms']:.3g} |" in text
    ratio = re.search(r"<b>([\d.]+)×</b><span>time, fused over peft", page)
    assert float(ratio[1]) == pytest.approx(11 / 16, abs=0.05)


def test_devices_are_not_mixed():
    text = markdown(rows(0) + rows(1, device="another"))
    assert text.count("| fused |") == 4 and "## a, a machine" in text and "## b, another" in text
    page = html_page(rows(0) + rows(1, device="another"))
    assert "Medians over 2 cases, another." in page and page.count("<h2>Every case") == 2


def test_a_report_of_little_is_a_report(tmp_path):
    few = [row for row in rows(0, cases=("a",)) if row["implementation"] == "frozen"]
    for row in few:
        for name in ("flops", "bytes", "x_peft"):
            del row[name]
    assert "<h2>Every case" in html_page(few) and "## a" in markdown(few)
    assert measured_rows(tmp_path / "f.jsonl") == few if saved(tmp_path / "f.jsonl", few) else False

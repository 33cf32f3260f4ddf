"""Rows of the suite as Markdown, and as one self-contained page with plots."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape

from bench.suite.compare import newest
from bench.suite.growth import AXES, growth_lines, series
from bench.suite.implementations import IMPLEMENTATIONS
from bench.suite.run import faults, left_out_text
from mmpeft_fast.pages.bars import stacked_bars
from mmpeft_fast.pages.lines import HEIGHT, WIDTH, line_chart
from mmpeft_fast.pages.page import fills, legend, notes, page, table_html
from mmpeft_fast.pages.svg import readable

_COLOURS = {"frozen": "var(--frozen)", "peft": "var(--peft)", "fused": "var(--fused)"}
# Of the page's palette, what none of the three looks like.
_OTHERS = ("var(--c0)", "var(--c7)", "var(--c3)", "var(--c6)", "var(--c1)", "var(--c9)", "var(--c8)")
_COLOURS |= dict(zip((name for name in IMPLEMENTATIONS if name not in _COLOURS), itertools.cycle(_OTHERS)))
_ROOF = "roof"
_MOST_BARS = 12  # cases with memory bars; the table has all
_COLUMNS = (
    "implementation", "ms", "20 to 80 %", "x frozen", "x peft", "kept MiB", "peak MiB", "error", "HF PEFT's"
)  # fmt: skip
_NOTES = (
    ("ms", "median of a forward and a backward pass; the implementations run in turn, round after round."),
    ("noise", "how far from 1 the 99 % interval of the same model's time over itself reaches, timed twice."),
    ("frozen", "the stock model's forward pass and the gradient of its input: nothing is trained."),
    (
        "peft",
        "HF PEFT as it comes, adapters in float32; peft_bf16: adapters in the model's dtype; compile: peft under "
        "torch.compile.",
    ),
    (
        "fused",
        "this package as it chooses its kernels; fused_torch and the like: one provider forced; graphs: replayed as "
        "CUDA graphs.",
    ),
    (
        "composite, manual",
        "in the style of LoRAFusion, and of stacks with autograd functions by hand; written here, adapters in the "
        "model's dtype.",
    ),
    (
        "error",
        "of the loss or the gradient that is farthest off HF PEFT in float64, dropout off; beside it HF PEFT's own in "
        "the same dtype. Beyond twice that and a floor an implementation is refused, not timed.",
    ),
    ("kept MiB", "what autograd keeps for the backward pass, without parameters; peak: of a pass, above the weights."),
    ("roof", "the lower of this run's rate of a large product, and its copy's bandwidth times the intensity."),
)


class _Rows:
    """Rows of one device by what they are about. where: behind a title, where there are several devices."""

    def __init__(self, rows: Sequence[Mapping], where: str = ""):
        self.where = where
        measured = [row for row in rows if row["mode"] == "fwd_bwd"]
        self.growth = [row for row in measured if "growth" in row]
        self.sweep = [row for row in measured if "sweep" in row]
        self.suite = [row for row in measured if "growth" not in row and "sweep" not in row]
        self.machines = [row for row in rows if row["mode"] == "machine"]
        self.left_out = [row for row in rows if row["mode"] == "left out"]
        self.cases = newest(self.suite)
        self.measured = measured

    def timed(self) -> list[dict]:
        """The newest rows of the suite's cases that have a time."""
        return [row for named in self.cases.values() for row in named.values() if "p50_ms" in row]

    def sweeps(self) -> dict[str, list[dict]]:
        """Rows of each seed and dtype."""
        return _grouped(self.sweep, lambda row: f"seed {row['sweep']}, {row['dtype']}")

    def growths(self) -> dict[str, list[dict]]:
        """Rows of each model, method and dtype."""
        return _grouped(self.growth, lambda row: f"{row['model']} {row['method']} {row['dtype']}")


def _grouped(rows: Sequence[Mapping], key: Callable[[Mapping], str]) -> dict[str, list[Mapping]]:
    found: dict[str, list[Mapping]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def _of_devices(rows: Sequence[Mapping]) -> list[_Rows]:
    devices = _grouped(rows, lambda row: row["device"])
    return [_Rows(of_one, f", {device}" if len(devices) > 1 else "") for device, of_one in devices.items()]


def _where(row: Mapping) -> str:
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "transformers", "peft") if row.get(name))
    state = " with changes" if row.get("dirty") else ""
    return f"{row['device']}, {row['threads']} CPU threads, {versions}, commit {row['commit'] or 'unknown'}{state}"


def _places(found: _Rows) -> list[str]:
    return list(dict.fromkeys(_where(row) for row in found.measured))


def _cells(row: Mapping) -> tuple[str, ...]:
    if "p50_ms" not in row:
        return (row["implementation"], f"{row['status']}: {row['reason']}")
    error = f"{row['error']:.1e}" if "error" in row else "-"
    eager = f"{row['eager_error']:.1e}" if "error" in row else "-"
    return (
        row["implementation"], readable(row["p50_ms"]), f"{readable(row['p20_ms'])} to {readable(row['p80_ms'])}",
        f"{row['x_frozen']:.2f}", f"{row['x_peft']:.2f}" if "x_peft" in row else "-", readable(row["saved_mib"]),
        readable(row["peak_mib"]) if "peak_mib" in row else "-", error, eager,
    )  # fmt: skip


def _noise(named: Mapping[str, Mapping]) -> str:
    return next((f"{row['noise']:.1%}" for row in named.values() if "noise" in row), "unknown")


def _medians(found: _Rows) -> list[tuple[str, str]]:
    """(value, of what) over the cases that have both."""
    pairs = [(named["fused"], named) for named in found.cases.values() if "p50_ms" in named.get("fused", {})]
    medians = []

    def add(text: str, ratio: Callable[[Mapping, Mapping], float], other: str) -> None:
        ratios = [ratio(fused, named[other]) for fused, named in pairs if "p50_ms" in named.get(other, {})]
        if ratios:
            medians.append((f"{statistics.median(ratios):.2f}×", text))

    add("time, fused over peft", lambda fused, other: fused["p50_ms"] / other["p50_ms"], "peft")
    add("time, fused over frozen", lambda fused, other: fused["p50_ms"] / other["p50_ms"], "frozen")
    add("kept bytes, fused over peft", lambda fused, other: fused["saved_mib"] / (other["saved_mib"] or 1), "peft")
    return medians


def _absent(found: _Rows) -> list[str]:
    """What did not take part anywhere, and why; refusals case by case."""
    reasons: dict[str, set[str]] = {}
    ran = {row["implementation"] for row in found.measured if "p50_ms" in row}
    lines = []
    for row in found.measured:
        if "p50_ms" not in row and row["implementation"] not in ran:
            reasons.setdefault(row["implementation"], set()).add(f"{row['status']}: {row['reason']}")
        if row["status"] in ("refused", "failed"):
            lines.append(f"{row['case']}: {row['implementation']} {row['status']}: {row['reason']}")
    return [f"{name} {'; '.join(sorted(why))}" for name, why in reasons.items()] + lines


def markdown(rows: Sequence[Mapping]) -> str:
    """The report as Markdown."""
    devices = _of_devices(rows)
    lines = ["# Benchmarks", "", *(f"- {place}" for found in devices for place in _places(found)), ""]
    for found in devices:
        for case, named in found.cases.items():
            lines += [f"## {case}{found.where}", "", f"Noise {_noise(named)}.", ""]
            lines += [f"| {' | '.join(_COLUMNS)} |", f"| --- |{' ---: |' * (len(_COLUMNS) - 1)}"]
            for row in named.values():
                cells = _cells(row)
                lines.append(f"| {' | '.join((*cells, *[''] * (len(_COLUMNS) - len(cells))))} |")
            lines.append("")
        for title, items in _lists(found):
            lines += [f"## {title}", "", *(f"- {item}" for item in items), ""]
    return "\n".join(lines)


def _lists(found: _Rows) -> list[tuple[str, list[str]]]:
    """(title, sentences) of what is no table."""
    lists = []
    for what, rows in found.growths().items():
        lists.append((f"Growth of {what}", [line for axis in AXES for line in growth_lines(rows, axis)]))
    for what, rows in found.sweeps().items():
        count = len({row["shape"] for row in rows})
        worse = faults(rows) or ["nowhere is fused slower than HF PEFT beyond the noise, and nowhere does it keep more"]
        lists.append((f"Random shapes: {what}, {count} of them", worse))
    lists.append(("Did not take part", _absent(found)))
    lists.append(("Left out", [left_out_text(row) for row in found.left_out]))
    return [(f"{title}{found.where}", items) for title, items in lists if items]


def html_page(rows: Sequence[Mapping]) -> str:
    """The report as a page without scripts or anything from outside."""
    devices = _of_devices(rows)
    sections = [_head(devices)]
    for found in devices:
        sections += [*_growth(found), _sizes(found), _roofline(found), _memory(found), _sweep(found), _table(found)]
        sections += [_list(title, items) for title, items in _lists(found)]
    sections.append(notes(_NOTES))
    style = (
        f"{fills(_COLOURS | {_ROOF: 'var(--soft)'})}svg polyline {{ fill: none; stroke-width: 2; }}\n"
        "svg text.title { font-weight: 600; }\nul { padding-left: 20px; margin: 8px 0; }\n"
        "tr.case td { font-weight: 600; border-top: 1px solid var(--rule); }\n"
    )
    return page("mmpeft-fast: benchmarks", [section for section in sections if section], style=style)


def _head(devices: Sequence[_Rows]) -> str:
    tiles, facts, counts = "", "", []
    for found in devices:
        medians = _medians(found)
        items = "".join(f"<div><b>{value}</b><span>{escape(text)}</span></div>" for value, text in medians)
        if medians:
            small = f"Medians over {len(found.cases)} cases{found.where}."
            tiles += f"<div class=figures>{items}</div>\n<p class=small>{escape(small)}</p>\n"
        facts += "".join(f"<dt>Measured on</dt><dd>{escape(place)}</dd>" for place in _places(found))
        counts += [f"{len(found.cases)} cases"] if found.cases else []
        counts += [f"growth of {what}" for what in found.growths()]
        shapes = {(row["sweep"], row["dtype"], row["shape"]) for row in found.sweep}
        counts += [f"{len(shapes)} random shapes"] if shapes else []
    return (
        f"<header>\n<h1>Benchmarks</h1>\n<p class=lead>Training passes, implementations in turn: "
        f"{escape(', '.join(counts))}.</p>\n{tiles}<dl class=facts>{facts}</dl>\n</header>"
    )


def _figure(lines: Mapping[str, Sequence[tuple[float, float]]], across: str, label: str, **options) -> str:
    """A chart on logarithmic axes."""
    shapes = line_chart(lines, across, label, is_log=True, colours=_COLOURS | {_ROOF: "var(--soft)"}, **options)
    spoken = escape(f"{label} over {across}: {', '.join(lines)}", quote=True)
    return f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{spoken}">{shapes}</svg></figure>'


def _section(title: str, names: Sequence[str], figures: Sequence[str], text: str = "") -> str:
    if not figures:
        return ""
    small = f"<p class=small>{escape(text)}</p>\n" if text else ""
    charts = f"<div class=charts>{''.join(figures)}</div>"
    return f"<section>\n<h2>{escape(title)}</h2>\n{small}{legend(names)}\n{charts}\n</section>"


def _growth(found: _Rows) -> list[str]:
    sections = []
    for what, rows in found.growths().items():
        figures, names = [], {}
        for axis in AXES:
            for label, value in (("ms", "p50_ms"), ("kept MiB", "saved_mib")):
                lines = {
                    name: positive
                    for name, points in series(rows, axis, value).items()
                    if (positive := [(x, y) for x, y in points if y > 0])
                }
                if lines:
                    figures.append(_figure(lines, axis, label))
                    names |= dict.fromkeys(lines)
        sections.append(_section(f"Growth of {what}{found.where}", list(names), figures, "Along one axis at a time."))
    return sections


def _by_implementation(rows: Sequence[Mapping], point: Callable[[Mapping], tuple[float, float]]) -> dict[str, list]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row["implementation"], []).append(point(row))
    return lines


def _sizes(found: _Rows) -> str:
    figures, names = [], {}
    flops = {case: named["frozen"].get("flops") for case, named in found.cases.items() if "frozen" in named}
    sized = [row for row in found.timed() if flops.get(row["case"])]
    for dtype in dict.fromkeys(row["dtype"] for row in sized):
        rows = [row for row in sized if row["dtype"] == dtype]
        lines = _by_implementation(rows, lambda row: (flops[row["case"]] / 1e9, row["p50_ms"]))
        figures.append(_figure(lines, "GFLOP of the frozen model's pass", f"ms, {dtype}", unjoined=tuple(lines)))
        names |= dict.fromkeys(lines)
    return _section(f"Time over size{found.where}", list(names), figures, "A point for each case.")


def _roofline(found: _Rows) -> str:
    figures, names = [], {}
    for dtype in dict.fromkeys(row["dtype"] for row in found.timed()):
        rows = [row for row in found.timed() if row["dtype"] == dtype and row.get("flops") and row.get("bytes")]
        roofs = [machine for machine in found.machines if dtype in machine["flops_per_s"]]
        if not rows or not roofs:
            continue
        lines = _by_implementation(rows, lambda row: (row["flops"] / row["bytes"], row["flops"] / row["p50_ms"] / 1e6))
        rate, bandwidth = roofs[-1]["flops_per_s"][dtype] / 1e9, roofs[-1]["bytes_per_s"] / 1e9
        xs = [x for points in lines.values() for x, _ in points]
        corners = sorted({min(xs), rate / bandwidth, max(*xs, rate / bandwidth)})
        roof = {_ROOF: [(x, min(rate, bandwidth * x)) for x in corners]}
        figures.append(_figure(roof | lines, "FLOPs a byte moved", f"GFLOP/s, {dtype}", unjoined=tuple(lines)))
        names |= dict.fromkeys((_ROOF, *lines))
    return _section(
        f"Roofline{found.where}", list(names), figures, "Every operand of an op counts once, whatever caches hold."
    )


def _memory(found: _Rows) -> str:
    figures, names = [], {}
    for case, named in list(found.cases.items())[:_MOST_BARS]:
        bars = {name: {name: row["saved_mib"]} for name, row in named.items() if "saved_mib" in row}
        if bars:
            chart = stacked_bars(f"{case}: kept bytes", bars, "MiB")
            figures.append(f"<figure><figcaption>{escape(case)}</figcaption>{chart}</figure>")
            names |= dict.fromkeys(bars)
    return _section(f"Kept for the backward pass{found.where}", list(names), figures)


def _sweep(found: _Rows) -> str:
    figures = []
    for what, rows in found.sweeps().items():
        for label, value in (("time, fused over peft", "p50_ms"), ("kept bytes, fused over peft", "saved_mib")):
            named: dict[int, dict[str, Mapping]] = {}
            for row in rows:
                named.setdefault(row["shape"], {})[row["implementation"]] = row
            points = [
                (one["peft"]["batch_size"] * one["peft"]["seq_len"], one["fused"][value] / one["peft"][value])
                for one in named.values()
                if all(one.get(name, {}).get(value) for name in ("peft", "fused"))
            ]
            if points:
                equal = [(x, 1.0) for x in (min(points)[0], max(points)[0])]
                lines = {_ROOF: equal, "fused": sorted(points)}
                figures.append(_figure(lines, f"tokens; {what}", label, unjoined=("fused",)))
    return _section(
        f"Random shapes{found.where}",
        ["fused"],
        figures,
        "A point for each shape; below the line at 1 fused is better.",
    )


def _table(found: _Rows) -> str:
    tables = []
    for case, named in found.cases.items():
        timed = [_cells(row) for row in named.values() if "p50_ms" in row]
        others = "; ".join(" ".join(_cells(row)) for row in named.values() if "p50_ms" not in row)
        tables.append(
            f"<details><summary>{escape(case)} <span class=small>noise {_noise(named)}</span></summary>"
            f"{table_html(_COLUMNS, timed)}<p class=small>{escape(others)}</p></details>"
        )
    return f"<section>\n<h2>Every case{escape(found.where)}</h2>\n{''.join(tables)}\n</section>" if tables else ""


def _list(title: str, items: Sequence[str]) -> str:
    inside = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<section>\n<h2>{escape(title)}</h2>\n<ul class=small>{inside}</ul>\n</section>"

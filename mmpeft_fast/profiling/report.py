"""report.html of a profile: one self-contained page, without scripts or anything from outside, in the study's look."""

from collections.abc import Mapping, Sequence
from html import escape

from mmpeft_fast.doctor import versions
from mmpeft_fast.pages.bars import stacked_bars
from mmpeft_fast.pages.page import fills, legend, notes, page, table_html
from mmpeft_fast.pages.svg import readable
from mmpeft_fast.plan.devices import Device
from mmpeft_fast.plan.parts import PARTS
from mmpeft_fast.profiling.charts import memory_areas
from mmpeft_fast.profiling.measured import RATIOS, Measured, comparisons
from mmpeft_fast.profiling.rows import HEADER, OUTSIDE, Row, by_part, cells
from mmpeft_fast.profiling.storages import ROLES
from mmpeft_fast.profiling.text import TOTALS, ratio_text, title_of, totals

BETWEEN = "between ops"
_NUM_OPS = 40
_RATIO_NAMES = {
    "time": "time", "launches": "launches", "bytes": "bytes moved", "flops": "FLOPs", "peak": "peak memory"
}  # fmt: skip
_ROLE_COLOURS = (2, 7, 3, 4, 6)  # of the palette, in the order of ROLES

NOTES = (
    ("ms", "median time of a run without tracing; the implementations run in turn, so that they see the same machine."),
    (
        "ops ms",
        "time inside ops (CPU) or kernels (GPU) of a traced run, the one in the middle of three. What it lacks to ms "
        "is time between ops: Python, the dispatcher, waiting.",
    ),
    ("launches", "kernels, copies and fills on a GPU; on a CPU ops that compute or move data. Views are free."),
    ("MB moved", "every operand of an op once, read or written, whatever caches hold."),
    (
        "of roofline",
        "the fastest time that the device's profile allows, the longer of FLOPs at its rate and bytes at its "
        "bandwidth, over the measured time. Above 100 % where caches beat the memory's bandwidth.",
    ),
    (
        "part",
        "follows from the module that runs, forward or backward, and inside the decoder from the op; inputs are "
        "embeddings, positions, masks; elementwise is what lies between GEMMs, attention and norms.",
    ),
    (
        "memory",
        "tensors alive, by what they become: a tensor that is saved for the backward pass counts as that from its "
        "birth on. Scratch memory inside an op is not seen. Other: inputs, activations and gradients of activations "
        "on their way.",
    ),
    ("frozen", "forward and the gradient of the input embeddings of the stock model: nothing is trained."),
)


def report_html(measured: Sequence[Measured], request: Mapping, device: Device | None) -> str:
    """The page.

    Args:
        measured: at least one implementation.
        request: what was asked for; device: the roofline's profile, if there was one.
    """
    sections = _head(measured, request, device), _totals(measured), _parts(measured), _memory(measured), _ops(measured)
    return page("mmpeft-fast: profile", [*sections, notes(NOTES)], style=_style())


def _style() -> str:
    """The colours of parts and roles, and what this page sets otherwise than others."""
    names = [*PARTS, OUTSIDE]
    colours = {name: f"var(--c{i})" for i, name in enumerate(names)}
    colours |= {role: f"var(--c{i})" for role, i in zip(ROLES, _ROLE_COLOURS, strict=True)}
    colours[BETWEEN] = "var(--rule)"
    return (
        f"{fills(colours)}.figures div {{ flex-basis: 140px; }}\n"
        ".legend { flex-wrap: wrap; row-gap: 4px; }\n.scroll { margin-bottom: 12px; }\n"
        "svg text.tick { fill: var(--soft); }\n"
        "td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }\n"
        "tr.total td { border-top: 1px solid var(--rule); font-weight: 600; }\n"
        ".bars svg { max-width: 720px; }\n"
        "svg line.phase { stroke: var(--ink); stroke-opacity: .35; }\n"
        "svg text.phase { font-size: 11px; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }\n"
        "svg .peak { fill: var(--ink); stroke: var(--card); stroke-width: 1.5; }\n"
    )


def _head(measured: Sequence[Measured], request: Mapping, device: Device | None) -> str:
    last = f"{measured[-1].name}/{measured[-2].name}" if len(measured) > 1 else ""
    tiles = [
        (ratio_text(value), f"{_RATIO_NAMES[name]}, {last.replace('/', ' over ')}")
        for name, value in comparisons(measured).get(last, {}).items()
        if value is not None
    ] or [
        (f"{readable(measured[0].seconds * 1e3)} ms", "time"),
        (str(measured[0].whole.launches), "launches"),
        (f"{measured[0].timeline.peak_bytes / 2**20:.1f} MiB", "peak memory"),
    ]
    figures = "".join(f"<div><b>{value}</b><span>{escape(label)}</span></div>" for value, label in tiles)
    facts = [(one.name, one.origin) for one in measured]
    facts += [("Versions", ", ".join(f"{name} {version}" for name, version in versions().items() if version))]
    if request.get("threads"):
        facts.append(("Threads", str(request["threads"])))
    if device is not None:
        facts.append((f"Roofline: {device.name}", "; ".join(f"{k}: {v}" for k, v in device.sources.items())))
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts)
    return (
        f"<header>\n<h1>Profile</h1>\n<p class=lead>{escape(title_of(request))}</p>\n"
        f"<div class=figures>{figures}</div>\n<dl class=facts>{terms}</dl>\n</header>"
    )


def _totals(measured: Sequence[Measured]) -> str:
    section = f"<section>\n<h2>Side by side</h2>\n{table_html(TOTALS, totals(measured))}\n"
    found = comparisons(measured)
    if found:
        ratios = [
            (pair.replace("/", " over "), *(ratio_text(values[name]) for name in RATIOS))
            for pair, values in found.items()
        ]
        section += table_html(("ratio", *(_RATIO_NAMES[name] for name in RATIOS)), ratios)
    return section + "</section>"


def _parts(measured: Sequence[Measured]) -> str:
    found = {one.name: by_part(one.rows) for one in measured}
    bars = {}
    for one in measured:
        bars[one.name] = {row.part: row.seconds * 1e3 for row in found[one.name]}
        between_s = one.seconds - one.whole.seconds
        if between_s > 0:
            bars[one.name][BETWEEN] = between_s * 1e3
    seen = [name for name in (*PARTS, OUTSIDE, BETWEEN) if any(name in values for values in bars.values())]
    chart = stacked_bars("Time by part", bars, "ms")
    names = [part for part in seen if part != BETWEEN]
    rows = [
        (part, *(f"{bars[one.name].get(part, 0.0):.3f}" for one in measured), *_part_ratio(part, measured, bars))
        for part in names
    ]
    header = ("ops ms", *bars, *([f"{measured[-1].name} over {measured[-2].name}"] if len(measured) > 1 else []))
    details = "".join(
        f"<details><summary>{escape(one.name)}, all numbers</summary>"
        f"{_rows_table('part', [(row.part, row) for row in found[one.name]], one)}</details>"
        for one in measured
    )
    return (
        f"<section>\n<h2>Time by part</h2>\n{legend(seen)}\n<figure class=bars>{chart}</figure>\n"
        f"{table_html(header, rows)}\n{details}\n</section>"
    )


def _part_ratio(part: str, measured: Sequence[Measured], bars: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The last implementation over the one before, in a list that is empty where there is one only."""
    if len(measured) < 2:
        return []
    one, other = (bars[measured[i].name].get(part, 0.0) for i in (-1, -2))
    return [ratio_text(one / other if other else None)]


def _rows_table(title: str, rows: Sequence[tuple[str, Row]], one: Measured) -> str:
    whole = one.whole
    lines = [(label, *cells(row, whole)) for label, row in rows] + [("all", *cells(whole, whole))]
    return table_html((title, *HEADER), lines, has_total=True)


def _memory(measured: Sequence[Measured]) -> str:
    most = max(one.timeline.peak_bytes for one in measured)
    charts = "".join(
        f"<figure><figcaption>{escape(one.name)}</figcaption>{memory_areas(one.name, one.timeline, most)}</figure>"
        for one in measured
    )
    held = {one.name: one.timeline.peak_by_role() for one in measured}
    rows = [(role, *(f"{held[one.name][role] / 2**20:.2f}" for one in measured)) for role in ROLES]
    rows.append(("all", *(f"{one.timeline.peak_bytes / 2**20:.2f}" for one in measured)))
    return (
        f"<section>\n<h2>Memory</h2>\n{legend(ROLES)}\n<div class=charts>{charts}</div>\n"
        f"<h3>What holds the peak, MiB</h3>{table_html(('', *held), rows, has_total=True)}</section>"
    )


def _ops(measured: Sequence[Measured]) -> str:
    items = []
    for one in measured:
        rows = [(f"{row.part}: {row.op}, {row.phase}", row) for row in one.rows[:_NUM_OPS]]
        left = f", the {_NUM_OPS} slowest" if len(one.rows) > _NUM_OPS else ""
        opened = " open" if one is measured[-1] else ""
        items.append(
            f"<details{opened}><summary>{escape(one.name)} <span class=small>{len(one.rows)} kinds of ops{left}</span>"
            f"</summary>{_rows_table('op', rows, one)}</details>"
        )
    return f"<section>\n<h2>Ops</h2>\n{''.join(items)}</section>"

"""The report's sections of what is learnt: accuracy against cost, and along each of `cells.AXES`."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape

from mmpeft_fast.pages.lines import COLOURS, HEIGHT, WIDTH, line_chart
from mmpeft_fast.pages.page import heat_table, table_html
from mmpeft_fast.pages.points import Point, points_chart
from mmpeft_fast.study.cells import MAJORITY, TINY_MODELS
from mmpeft_fast.study.charts import spread_chart
from mmpeft_fast.study.table import MISSING

COSTS = (("peak_mib", "MiB at peak", "memory", True), ("tokens_per_s", "tokens / s", "throughput", False))
_CURVES = (
    ("size", "trained parameters, thousands", "Size of the modules"),
    ("samples", "different training samples", "Training samples"),
)


def varied_sections(rows: Sequence[dict]) -> list[str]:
    """The sections for which there are rows, of easy-vqa on the tiny models.

    Args:
        rows: of results.jsonl; only those that have an accuracy and a task count.
    """
    known = [row for row in rows if row["task"] and row["accuracy"] is not None]
    first = [row for row in known if row["model"] == next(iter(TINY_MODELS))]
    found = (
        _accuracy_section(known),
        _tasks_section(first),
        _location_section(first),
        _curves_section(first),
        _seeds_section(first),
        _papers_section(first),
    )
    return [section for section in found if section]


def _accuracy_section(rows: Sequence[dict]) -> str:
    """Accuracy on the unseen type against memory and against throughput, a pair of charts a model."""
    figures = []
    for model in dict.fromkeys(row["model"] for row in rows):
        tuned = [row for row in _of_methods(rows) if row["model"] == model and row["tokens_per_s"]]
        for name, across, cost, less_is_better in COSTS:
            if tuned:
                title = f"{model}: accuracy and {cost}"
                points = [Point(row["method"], row[name], _percent(row)) for row in tuned]
                chart = points_chart(title, points, across, "accuracy, %", less_is_better=less_is_better)
                figures.append(figure(title, chart))
    return section(
        "Accuracy and what it costs",
        "Fused, tuned on a type of questions that the base has never met: which colour the shape has. The dashed line "
        "joins the methods that no other beats in both directions.",
        figures,
    )


def _tasks_section(rows: Sequence[dict]) -> str:
    """Each method on both types of questions, beside the base as it is and the commonest answer."""
    by_name: dict[str, dict[str, str]] = defaultdict(dict)
    names = {"frozen": "the base as it is", MAJORITY: "the commonest answer"}
    for row in rows:
        if row["axis"] in ("", "task") and row["implementation"] in ("fused", *names):
            name = names.get(row["implementation"], row["method"])
            by_name[name][row["task"]] = f"{_percent(row):.1f}"
    if not any("seen" in accuracies for accuracies in by_name.values()):
        return ""
    lines = [(name, each.get("unseen", MISSING), each.get("seen", MISSING)) for name, each in by_name.items()]
    return section(
        "New and known questions",
        "Accuracy in per cent after tuning on what the base has never been asked (colours), and on what it was trained "
        "to answer (shapes).",
        [],
        table_html(("", "new", "known"), lines),
    )


def _location_section(rows: Sequence[dict]) -> str:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in _along(rows, "location"):
        found[row["method"]][row["value"]] = _percent(row)
    if not found:
        return ""
    places = list(dict.fromkeys(place for each in found.values() for place in each))
    table = heat_table(
        ("accuracy, %", *places), [(name, [each.get(place) for place in places]) for name, each in found.items()]
    )
    lead = "Accuracy on new questions by method and by which linear layers carry its modules."
    return section("Location of the modules", lead, [], table)


def _curves_section(rows: Sequence[dict]) -> str:
    """Accuracy over the size of the modules, and over the number of training samples."""
    figures = []
    for axis, across, title in _CURVES:
        lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in _with_own(rows, axis):
            lines[row["method"]].append((_position(row, axis), _percent(row)))
        if lines:
            figures.append(curves(title, across, {name: sorted(points) for name, points in lines.items()}))
    return section("Size and samples", "", figures)


def curves(title: str, across: str, lines: Mapping[str, list[tuple[float, float]]], label: str = "accuracy, %") -> str:
    """A figure of lines by name with their legend; label: what y is."""
    spoken = "; ".join(f"{name} " + ", ".join(f"{y:.1f} at {x:.3g}" for x, y in lines[name]) for name in lines)
    shapes = line_chart(lines, across, label)
    legend = "".join(
        f'<span style="--line: {COLOURS[i % len(COLOURS)]}">{escape(name)}</span>' for i, name in enumerate(lines)
    )
    chart = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}: {escape(spoken)}">{shapes}</svg>'
    return figure(title, f"{chart}<p class=lines>{legend}</p>")


def _position(row: dict, axis: str) -> float:
    if axis == "size":
        return row["trainable_params"] / 1e3
    return row["train_samples"] or row["steps"] * row["batch_size"]


def _seeds_section(rows: Sequence[dict]) -> str:
    """Each method's accuracy with each seed, their mean and standard deviation."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in _with_own(rows, "seed"):
        found[row["method"]].append(_percent(row))
    if not found:
        return ""
    title = "Accuracy over seeds, %"
    return section(
        "Stability",
        "A dot is a seed of initial values, batches and dropout on the same base; a bar is their mean, and behind it "
        "stand the mean and the sample's standard deviation.",
        [figure(title, spread_chart(title, found))],
    )


def _papers_section(rows: Sequence[dict]) -> str:
    """Published means beside ours, where what is compared is the same."""
    from mmpeft_fast.study.recipes import FULL, make_recipe

    ours = {
        (row["axis"], row["method"], row["value"]): row
        for row in rows
        if row["axis"] in ("location", "connector") and row["implementation"] == "fused"
    }
    ours |= {("connector", row["method"], "frozen"): row for row in _of_methods(rows)}
    lines = []
    for axis in ("location", "connector"):
        for each in make_recipe(axis, FULL).published:
            row = ours.get((axis, each.labels["method"], each.labels[axis]))
            if row and each.measure == "score":
                name = f"{each.labels['method']}, {axis} {each.labels[axis]}"
                lines.append((name, f"{_percent(row):.1f}", each.value, each.labels["model"], each.source))
    if not lines:
        return ""
    return section(
        "The papers beside",
        "Ours is a model thousands of times smaller, on other questions: which setting is ahead may be compared, the "
        "numbers may not.",
        [],
        table_html(("", "ours, %", "published", "model", "source"), lines),
    )


def _of_methods(rows: Sequence[dict]) -> list[dict]:
    """Each method's own cell: fused, at its usual settings, on what the base has never met."""
    return [row for row in rows if row["implementation"] == "fused" and not row["axis"] and row["task"] == "unseen"]


def _along(rows: Sequence[dict], axis: str) -> list[dict]:
    return [row for row in rows if row["axis"] == axis]


def _with_own(rows: Sequence[dict], axis: str) -> list[dict]:
    """The rows of an axis and, of the same methods, their own cells."""
    along = _along(rows, axis)
    methods = {row["method"] for row in along}
    return along + [row for row in _of_methods(rows) if row["method"] in methods]


def _percent(row: dict) -> float:
    return 100 * row["accuracy"]


def figure(title: str, chart: str) -> str:
    """A chart with its caption."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def section(title: str, lead: str, figures: Sequence[str], body: str = "") -> str:
    """A section of charts and, under them, HTML; empty where there is neither."""
    if not figures and not body:
        return ""
    charts = f"<div class='charts pairs'>{''.join(figures)}</div>" if figures else ""
    words = f"<p class=small>{lead}</p>\n" if lead else ""
    return f"<section>\n<h2>{title}</h2>\n{words}{charts}{body}\n</section>"

"""report.html of a recipe: its table, accuracy against cost, scores over epochs, and the published numbers beside."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path

from mmpeft_fast.atomic import write_text
from mmpeft_fast.pages.page import page, table_html
from mmpeft_fast.pages.points import Point, points_chart
from mmpeft_fast.study.recipes.recipe import Recipe
from mmpeft_fast.study.recipes.table import entry_cells, entry_name, table_titles
from mmpeft_fast.study.table import MISSING
from mmpeft_fast.study.varied import COSTS, curves, figure, section


def write_page(recipe: Recipe, entries: Sequence[dict], folder: Path) -> Path:
    """Writes report.html into `folder`, whole or not at all; returns its path. entries: of `table.summary`."""
    path = folder / "report.html"
    write_text(path, recipe_page(recipe, entries))
    return path


def recipe_page(recipe: Recipe, entries: Sequence[dict]) -> str:
    """The page, see `write_page`."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in recipe.notes)
    head = (
        f"<header>\n<h1>{escape(recipe.title[0].upper() + recipe.title[1:])}</h1>\n"
        f"<p class=lead>Recipe {escape(recipe.name)}, an experiment of {escape(recipe.source)}.</p>\n"
        f"{f'<ul class=small>{notes}</ul>' if notes else ''}</header>"
    )
    numbers = len(recipe.rows)  # where the columns of numbers begin; a row's labels stand in one
    table = table_html(
        (" ".join(recipe.rows), *table_titles(recipe)[numbers:]),
        [(entry_name(recipe, each), *entry_cells(recipe, each)[numbers:]) for each in entries],
    )
    sections = (
        section("Results", "", [], table),
        section("Score and what it costs", "", _cost_figures(recipe, entries)),
        section("Scores by epoch", "", _epoch_figures(recipe, entries)),
        _published_section(recipe, entries),
    )
    return page(f"mmpeft-fast: {recipe.title}", [head, *filter(None, sections)])


def _cost_figures(recipe: Recipe, entries: Sequence[dict]) -> list[str]:
    figures = []
    for name, across, cost, less_is_better in COSTS:
        known = [each for each in entries if each["score"] is not None and each[name]]
        if len(known) > 1:
            title = f"score and {cost}"
            points = [Point(entry_name(recipe, each), each[name], each["score"]) for each in known]
            figures.append(
                figure(title, points_chart(title, points, across, "score, %", less_is_better=less_is_better))
            )
    return figures


def _epoch_figures(recipe: Recipe, entries: Sequence[dict]) -> list[str]:
    """A chart for each test that there was more than once."""
    tests: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        for each in entry["scores"]:
            tests[f"{each['set']}, {each['metric']}"][entry_name(recipe, entry)].append((each["epoch"], each["score"]))
    return [
        curves(test, "epoch", {name: sorted(points) for name, points in lines.items()}, "score, %")
        for test, lines in tests.items()
        if any(len(points) > 1 for points in lines.values())
    ]


def _published_section(recipe: Recipe, entries: Sequence[dict]) -> str:
    lines = [
        (f"{entry_name(recipe, entry)}: {each['quantity']}", each["ours"] or MISSING, each["value"], each["model"])
        + (each["source"],)
        for entry in entries
        for each in entry["published"]
    ]
    if not lines:
        return ""
    lead = "Where the model is another than the paper's, which setting is ahead may be compared, the numbers may not."
    return section("The papers beside", lead, [], table_html(("", "ours", "published", "model", "source"), lines))

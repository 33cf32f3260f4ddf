"""A recipe's rows as a table: means over tasks, deviations over seeds, and the published numbers beside them."""

import statistics
from collections import defaultdict
from collections.abc import Callable

from mmpeft_fast.study.recipes.recipe import Recipe
from mmpeft_fast.study.rows import SUCCESS
from mmpeft_fast.study.table import MISSING, count, decimal

_MEASURED = ("trainable_params", "total_params", "step_ms_p50", "tokens_per_s", "peak_mib")


def headline(score: dict) -> float:
    """A score's first number, in percent (CIDEr, too, is told times 100)."""
    return 100 * next(value for name, value in score.items() if name not in ("epoch", "set", "metric"))


def _trained_percent(entry: dict) -> str:
    return f"{100 * entry['trainable_params'] / entry['total_params']:.3g}"


def _score_and_deviation(entry: dict) -> str:
    return f"{entry['score']:.1f} +- {entry['deviation']:.1f}"


# Ours beside a published number: how an entry's own number reads. What the entry lacks is missing.
MEASURES: dict[str, Callable[[dict], str]] = {
    "score": lambda entry: f"{entry['score']:.1f}",
    "score_and_deviation": _score_and_deviation,
    "trained_percent": _trained_percent,
    "trained_millions": lambda entry: f"{entry['trainable_params'] / 1e6:.3g}",
    "peak_gb": lambda entry: f"{entry['peak_mib'] * 2**20 / 1e9:.1f}",
    "step_s": lambda entry: f"{entry['step_ms_p50'] / 1e3:.2f}",
    "less_parameters": lambda entry: f"{100 * (1 - entry['trainable_params'] / entry['lora']['trainable_params']):.1f}",
    "less_memory": lambda entry: f"{100 * (1 - entry['peak_mib'] / entry['lora']['peak_mib']):.1f}",
}


def summary(recipe: Recipe, rows: list[dict], *, any_model: bool) -> list[dict]:
    """One entry for each of the table's rows.

    `score`: the mean over tasks (and seeds) of the headlines in percent that the recipe scores, `deviation`: the
    standard deviation over seeds of the tasks' mean, `scores`: the mean by set and epoch, the means of what was
    measured, and the published numbers with ours. any_model: a published number stands beside rows of other models than
    its own, as those of the small size are.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[tuple(row["labels"][axis] for axis in recipe.rows)].append(row)
    entries = [_entry(recipe, dict(zip(recipe.rows, key)), group) for key, group in groups.items()]
    for entry in entries:
        entry["published"] = [
            {
                "quantity": each.quantity,
                "value": each.value,
                "model": each.labels["model"],
                "source": each.source,
                "ours": _ours(each.measure, entry, entries),
            }
            for each in recipe.published
            if all(
                entry["labels"].get(axis) == value
                for axis, value in each.labels.items()
                if axis != "model" or not any_model
            )
        ]
    return entries


def _ours(measure: str, entry: dict, entries: list[dict]) -> str | None:
    others = {**entry["labels"], "method": "LoRA"}
    lora = next((other for other in entries if other["labels"] == others), None)
    try:
        return MEASURES[measure]({**entry, "lora": lora})
    except TypeError:  # a number that there is not
        return None


def last_scores(row: dict) -> list[dict]:
    """A row's scores after the last epoch."""
    scores = row.get("scores") or []
    last = max((each["epoch"] for each in scores), default=None)
    return [each for each in scores if each["epoch"] == last]


def _scored(recipe: Recipe, row: dict) -> list[float]:
    """The headlines that make up a row's score."""
    scores = (row.get("scores") or []) if recipe.over_epochs else last_scores(row)
    return [headline(each) for each in scores if recipe.scored in (None, each["metric"])]


def _entry(recipe: Recipe, labels: dict, rows: list[dict]) -> dict:
    done = [row for row in rows if row["status"] == SUCCESS]
    by_seed: dict[int, list[float]] = defaultdict(list)
    by_test: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for row in done:
        by_seed[row["seed"]] += _scored(recipe, row)
        for score in row.get("scores") or []:
            by_test[score["set"], score["metric"], score["epoch"]].append(headline(score))
    means = [statistics.fmean(scores) for scores in by_seed.values() if scores]
    return {
        "labels": labels,
        "cells": len(rows),
        "failed": len(rows) - len(done),
        "score": statistics.fmean(means) if means else None,
        "deviation": statistics.stdev(means) if len(means) > 1 else None,
        "scores": [
            {"set": name, "metric": metric, "epoch": epoch, "score": statistics.fmean(values)}
            for (name, metric, epoch), values in by_test.items()
        ],
        **{name: _mean(done, name) for name in _MEASURED},
    }


def _mean(rows: list[dict], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def recipe_table(recipe: Recipe, entries: list[dict]) -> str:
    """The entries as an aligned table, the published numbers and the notes under it."""
    axes = recipe.rows
    lines = [table_titles(recipe)] + [entry_cells(recipe, entry) for entry in entries]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        "  ".join(
            cell.ljust(width) if index < len(axes) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]
    text.insert(1, "  ".join("─" * width for width in widths))
    curves = [_curve(recipe, entry) for entry in entries if len({each["epoch"] for each in entry["scores"]}) > 1]
    published = [line for entry in entries for line in _published(recipe, entry)]
    for title, more in (("scores % by epoch", curves), ("published beside ours", published), ("notes", recipe.notes)):
        if more:
            text += ["", title, *(f"  {line}" for line in more)]
    return "\n".join(text)


def table_titles(recipe: Recipe) -> list[str]:
    return [*recipe.rows, "cells", "score %", "+-", "trainable", "step ms", "tok/s", "peak MiB"]


def entry_cells(recipe: Recipe, entry: dict) -> list[str]:
    """An entry's texts under `table_titles`."""
    failed = f" ({entry['failed']} failed)" if entry["failed"] else ""
    return [
        *(entry["labels"][axis] for axis in recipe.rows),
        f"{entry['cells']}{failed}",
        decimal(entry["score"], 1),
        decimal(entry["deviation"], 1),
        count(entry["trainable_params"]),
        decimal(entry["step_ms_p50"], 1),
        count(entry["tokens_per_s"]),
        decimal(entry["peak_mib"], 0),
    ]


def entry_name(recipe: Recipe, entry: dict) -> str:
    return " ".join(entry["labels"][axis] for axis in recipe.rows)


def _curve(recipe: Recipe, entry: dict) -> str:
    by_test: dict[str, list[str]] = defaultdict(list)
    for each in entry["scores"]:
        by_test[f"{each['set']} {each['metric']}"].append(f"{each['epoch']:g}: {each['score']:.1f}")
    return f"{entry_name(recipe, entry)}: " + "; ".join(
        f"{name} {', '.join(values)}" for name, values in by_test.items()
    )


def _published(recipe: Recipe, entry: dict) -> list[str]:
    return [
        f"{entry_name(recipe, entry)}: {each['quantity']}: ours {each['ours'] or MISSING}, "
        f"{each['model']} {each['value']} ({each['source']})"
        for each in entry["published"]
    ]

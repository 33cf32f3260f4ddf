"""report.html: one self-contained page, without anything from outside, made from the rows alone."""

import csv
import io
import statistics
from html import escape
from pathlib import Path
from urllib.parse import quote

from mmpeft_fast.atomic import write_text
from mmpeft_fast.pages.page import notes, page, page_file
from mmpeft_fast.study.cells import EASY_VQA, NO_METHOD, TINY_MODELS, cell_name
from mmpeft_fast.study.charts import ratio_chart, sparkline
from mmpeft_fast.study.rows import SUCCESS
from mmpeft_fast.study.table import (
    COLUMNS,
    LOSS,
    MISSING,
    Column,
    count,
    decimal,
    frozen_rows,
    memory_ratio,
    time_ratio,
)
from mmpeft_fast.study.varied import varied_sections

REPORT_NAME = "report.html"
BARS = ("peft", "fused")
CHARTS = (("Step time", "step_ms_p50"), ("Saved memory", "saved_mib"), ("Peak memory", "peak_mib"))

NOTES = (
    (
        "frozen",
        "forward + dX of the stock model: no parameter gets a gradient, the decoder's input embeddings do. "
        "Fine-tuning that reaches down to the first layer has to do this much, so it is the speed of light for the "
        "stock model's computation. A fused model can be below 1: it skips positions that carry no label in the head "
        "and in the last layer, which the stock model computes.",
    ),
    (
        "peft",
        "Hugging Face PEFT where it has the method, else the method as an eager PyTorch module; the table of "
        "commands says which.",
    ),
    ("fused", "this package."),
    ("step ms", "median time of a training step (forward, backward, AdamW) after the warm-up steps."),
    (
        "× frozen",
        "step ms over the median time of frozen steps that ran in turn with them, in the same process and on "
        "the same batches. The ratio holds where the milliseconds of two processes cannot be compared.",
    ),
    (
        "saved MiB",
        "bytes that autograd keeps from forward to backward, each storage once, parameters and buffers left "
        "out. Measured in a step of its own.",
    ),
    (
        "peak MiB",
        "the most memory alive at once during a step: on CUDA what the allocator reports, on CPU all live "
        "tensors that the step sees, parameters included. Measured in a step of its own.",
    ),
    (
        "tokens",
        "tokens per step are those without padding, image tokens included; with padding the batch has as many "
        "positions as the second number says. Supervised tokens are the next-token targets that carry a label: the "
        "answers.",
    ),
    (
        "loss",
        "cross-entropy over the supervised tokens, of the first and the last step, which see the same batch; the curve "
        "has the steps between, each on a batch of its own.",
    ),
    (
        "accuracy",
        "share of held-out questions whose answer tokens all are the model's first choice, given the preceding ones.",
    ),
)


def write_report(rows: list[dict], folder: Path) -> Path:
    """Writes report.html into `folder`, whole or not at all.

    Args:
        rows: at least one row of results.jsonl, in the order to show them.
        folder: must exist.

    Returns:
        the report's path.
    """
    path = folder / REPORT_NAME
    write_text(path, report_html(rows))
    return path


def report_html(rows: list[dict]) -> str:
    """The page for the rows, see `write_report`."""
    own = [row for row in rows if not row["axis"]]  # of each method on each model; the others vary something
    models = list(dict.fromkeys(row["model"] for row in own))
    return page(
        "mmpeft-fast: the small study",
        [
            _head(rows, own),
            *(_model_section(model, [row for row in own if row["model"] == model]) for model in models),
            *varied_sections(rows),
            _table_section(rows),
            notes(NOTES),
            _commands_section(rows),
        ],
        script=page_file("sort.js"),
    )


def _head(rows: list[dict], own: list[dict]) -> str:
    tiny = any(row["model"] in TINY_MODELS for row in rows)
    data = "easy-vqa" if rows[0]["data"] == EASY_VQA else "the given conversations"
    text = (
        f"Ways of parameter-efficient fine-tuning on multimodal LLMs, each run by HF PEFT (<code>peft</code>) and "
        f"by this package (<code>fused</code>) on {data}, beside the frozen model's own forward and backward "
        f"(<code>frozen</code>): same seed, same batches, every timed cell in a fresh process."
    )
    if tiny and data == "easy-vqa":
        text += (
            " The tiny models are trained beforehand, a minute each, to describe pictures of shapes and to say which "
            "shape it is. Nobody has asked them for a colour: that is what the methods then teach them, and what their "
            "accuracy is about."
        )
    elif tiny:
        text += (
            " The tiny models were built from random weights and trained for a moment only, on the commoner half of "
            "the answers. Their losses and accuracies show that training works, not how good a method is; time and "
            "memory are what to read here."
        )
    return (
        f"<header>\n<h1>The small study</h1>\n<p class=lead>{text}</p>\n{_figures(own)}\n{_facts(own or rows)}\n"
        f"{_warnings(rows, own)}</header>"
    )


def _figures(rows: list[dict]) -> str:
    """The answer in three numbers: fused over peft, as medians over the pairs of cells that have both."""
    frozen = frozen_rows(rows)
    pairs = _pairs(rows)
    tiles = []
    for title, name in CHARTS:
        ratios = [_ratio(fused, None, name) / _ratio(peft, None, name) for peft, fused in pairs]
        if ratios:
            tiles.append((f"{statistics.median(ratios):.2f}×", f"{title.lower()}, fused over peft"))
    fused_rows = [row for row in rows if row["implementation"] == "fused" and row["status"] == SUCCESS]
    if fused_rows and frozen:
        ratio = statistics.median(time_ratio(row) for row in fused_rows)
        tiles.append((f"{ratio:.2f}×", "step time, fused over frozen"))
    items = "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
    lead = f"\n<p class=small>Medians over {len(pairs)} pairs of cells.</p>" if pairs else ""
    return f"<div class=figures>{items}</div>{lead}" if tiles else ""


def _pairs(rows: list[dict]) -> list[tuple[dict, dict]]:
    """(peft, fused) of every model and method that has both."""
    done = {(row["model"], row["method"], row["implementation"]): row for row in rows if row["status"] == SUCCESS}
    keys = [key for key in done if key[2] == "peft" and (*key[:2], "fused") in done]
    return [(done[key], done[*key[:2], "fused"]) for key in keys]


def _ratio(row: dict, frozen: dict | None, name: str) -> float | None:
    """A row's time over its own process's frozen step, or its MiB, over the frozen row's if there is one."""
    if name == "step_ms_p50":
        return time_ratio(row)
    return row[name] if frozen is None else memory_ratio(row, frozen, name)


def _facts(rows: list[dict]) -> str:
    """Device, versions and settings, as a list of terms."""
    row = rows[-1]
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    threads = f", {row['threads']} thread{'s' if row['threads'] != 1 else ''}" if row["device"] == "cpu" else ""
    times = [row["time"].replace("T", " ").replace("+00:00", " UTC") for row in rows]
    facts = [
        ("Device", f"{row['device_name']}{threads}"),
        ("Versions", versions),
        ("Settings", f"{row['steps']} steps of {row['batch_size']} samples, {row['dtype']}, seed {row['seed']}"),
        ("Measured", " to ".join(sorted({min(times), max(times)}))),
    ]
    return "<dl class=facts>" + "".join(f"<dt>{term}</dt><dd>{escape(text)}</dd>" for term, text in facts) + "</dl>"


def _warnings(rows: list[dict], own: list[dict]) -> str:
    """Says so where rows cannot be compared, or some failed."""
    warnings = []
    settings = {
        tuple(str(row[name]) for name in ("steps", "batch_size", "dtype", "seed", "threads", "device_name", "versions"))
        for row in own
    }
    if len(settings) > 1:
        warnings.append(
            f"These rows come from {len(settings)} different settings, devices or versions; compare with care."
        )
    failed = sum(row["status"] != SUCCESS for row in rows)
    if failed:
        warnings.append(f"{failed} of {len(rows)} cells failed; the table gives the reasons.")
    return "".join(f"<p class=warning>{escape(text)}</p>\n" for text in warnings)


def _model_section(model: str, rows: list[dict]) -> str:
    frozen = frozen_rows(rows).get(model)
    by_cell = {(row["method"], row["implementation"]): row for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != NO_METHOD))
    charts = []
    for title, name in CHARTS:
        if not methods or (name != "step_ms_p50" and (frozen is None or frozen["status"] != SUCCESS)):
            continue  # without a frozen row there is nothing to relate memory to
        groups = [
            (method, [(bar, _ratio(by_cell[method, bar], frozen, name)) for bar in BARS if (method, bar) in by_cell])
            for method in methods
        ]
        charts.append(f"<figure><figcaption>{title}</figcaption>{ratio_chart(f'{model}: {title}', groups)}</figure>")
    if not charts:
        return ""
    legend = "".join(f"<span class={bar}>{bar}</span>" for bar in BARS)
    return (
        f"<section>\n<h2>{escape(model)}</h2>\n<p class=small>{_model_line(rows)}</p>\n<p class=legend>{legend}</p>\n"
        f"<div class=charts>{''.join(charts)}</div>\n</section>"
    )


def _model_line(rows: list[dict]) -> str:
    """The model's size and the tokens of its batches."""
    row = next((row for row in rows if row["status"] == SUCCESS), None)
    if row is None:
        return "No cell of this model succeeded."
    return (
        f"{count(row['total_params'])} parameters; a step has {decimal(row['tokens_per_step'], 0)} tokens "
        f"({decimal(row['padded_tokens_per_step'], 0)} with padding), "
        f"{decimal(row['supervised_tokens_per_step'], 0)} of them supervised. Shorter bars are better."
    )


def _table_section(rows: list[dict]) -> str:
    """All columns of the terminal's table; the losses with their curve, and a failed row's reason over its numbers."""
    columns = COLUMNS[:-1]  # without the status, which only a failed row has to tell
    names = [column for column in columns if not column.is_number]
    head = "".join(f"<th{_class(column)}><button>{column.title}</button></th>" for column in columns)
    body, previous = [], {"model": None, "method": None}
    for row in rows:
        begins = next((name for name in ("model", "method") if row[name] != previous[name]), "")
        previous = row
        shown = columns if row["status"] == SUCCESS else names
        cells = "".join(
            f"<td{_class(column)}{_key(column, row)}>{escape(column.text(row))}{_curve(column, row)}</td>"
            for column in shown
        )
        if row["status"] != SUCCESS:
            reason = escape(f"{row['status']}: {row['reason']}")
            cells += f'<td colspan={len(columns) - len(names)} class="failed">{reason}</td>'
        body.append(f'\n<tr class="{row["implementation"]} {begins}">{cells}</tr>')
    return (
        f"<section>\n<h2>Every cell</h2>\n<p class=small>A column's title sorts by it. "
        f'<a download="study.csv" href="data:text/csv;charset=utf-8,{quote(rows_csv(rows))}">All rows as CSV</a></p>\n'
        f"<div class=scroll><table>\n<thead><tr>{head}</tr></thead>\n<tbody>{''.join(body)}</tbody></table></div>\n"
        "</section>"
    )


def rows_csv(rows: list[dict]) -> str:
    """The rows as CSV, a column for each field that is a word or a number."""
    plain = [{name: value for name, value in row.items() if not isinstance(value, list | dict)} for row in rows]
    found = io.StringIO()
    writer = csv.DictWriter(found, list(dict.fromkeys(name for row in plain for name in row)))
    writer.writeheader()
    writer.writerows(plain)
    return found.getvalue()


def _key(column: Column, row: dict) -> str:
    """What the script sorts by: numbers as they are, not as they are shown."""
    value = column.value(row)
    return "" if value in (None, MISSING) else f' data-key="{escape(str(value))}"'


def _curve(column: Column, row: dict) -> str:
    return sparkline(row["losses"]) if column is LOSS and row["losses"] else ""


def _class(column: Column) -> str:
    return " class=number" if column.is_number else ""


def _commands_section(rows: list[dict]) -> str:
    items = "".join(
        f"<details><summary>{escape(cell_name(row))} <span class=small>{escape(_origin(row))}</span></summary>"
        f"<pre><code>{escape(row['command'])}</code></pre></details>\n"
        for row in rows
    )
    return (
        f"<section>\n<h2>Measure a row again</h2>\n<p>Each command runs one cell, in the environment that "
        f"<code>make study</code> creates, with the versions above.</p>\n{items}</section>"
    )


def _origin(row: dict) -> str:
    """Whose code ran, and how long the cell took."""
    return ", ".join(filter(None, (row["baseline"], f"{row['elapsed_s']:.0f} s in all")))

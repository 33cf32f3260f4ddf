"""Plans over a grid of settings: the grid, and its rows as a table's columns and CSV."""

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from mmpeft_fast.plan.devices import device_named
from mmpeft_fast.plan.prediction import Plan, plan
from mmpeft_fast.plan.request import Request

_FIELDS = {field.name for field in dataclasses.fields(Request)} - {"settings"}
Axis = tuple[str, tuple]


def axis(text: str, parse) -> Axis:
    """`batch_size=1,2,4` as ("batch_size", (1, 2, 4)); parse: text of a value -> value.

    Raises:
        ValueError: no `=`, or nothing behind it.
    """
    name, equals, values = text.partition("=")
    parts = [part.strip() for part in values.split(",") if part.strip()]
    if not (equals and name.strip() and parts):
        raise ValueError(f"--sweep: expected NAME=VALUE,VALUE,.., got {text!r}")
    return name.strip().replace("-", "_"), tuple(map(parse, parts))


def points(request: Request, device: str, axes: Sequence[Axis]) -> Iterator[tuple[dict[str, Any], Request, str]]:
    """(values, request, device) of every point: the product of the axes. An axis is a field of the request, `device`,
    or a setting of the method.

    Raises:
        ValueError: two axes of one name, or a value that the request does not take.
    """
    names = [name for name, _ in axes]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"--sweep: expected every name once, got {repeated} again")
    for values in itertools.product(*(values for _, values in axes)):
        point = dict(zip(names, values, strict=True))
        changes = {name: value for name, value in point.items() if name in _FIELDS}
        settings = {name: value for name, value in point.items() if name not in _FIELDS and name != "device"}
        changes["settings"] = {**request.settings, **settings}
        yield point, dataclasses.replace(request, **changes), str(point.get("device", device))


def swept(request: Request, device: str, axes: Sequence[Axis]) -> list[tuple[dict[str, Any], Plan]]:
    """The plan of every point; every request and device is checked before the first is counted."""
    checked = [(point, changed, device_named(name)) for point, changed, name in points(request, device, axes)]
    return [(point, plan(changed, profile)) for point, changed, profile in checked]


def rows_of(plans: Sequence[tuple[dict[str, Any], Plan]]) -> list[dict[str, Any]]:
    """A flat row a point: its values, then the plan's numbers."""
    return [{**point, **planned.numbers()} for point, planned in plans]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

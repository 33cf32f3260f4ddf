"""The folder of a profile: traces, profile.json, report.html and memory snapshots, whole or not at all."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmpeft_fast.atomic import new_folder
from mmpeft_fast.doctor import versions
from mmpeft_fast.plan.devices import Device
from mmpeft_fast.profiling.measured import Measured, comparisons
from mmpeft_fast.profiling.report import report_html

PROFILE_NAME, REPORT_NAME = "profile.json", "report.html"


def check_folder(folder: Path) -> None:
    """Raises ValueError where a profile cannot be written to `folder`: what is there would be lost."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: expected a folder, got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PROFILE_NAME).is_file():
        raise ValueError(f"output: expected a new or empty folder, or one with an earlier profile, got {folder}")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        raise ValueError(f"output: expected a folder, got {folder} below the file {parent}")


def profile_json(measured: Sequence[Measured], request: Mapping, device: Device | None) -> dict:
    """All numbers, ready for JSON."""
    return {
        "request": dict(request),
        "versions": versions(),
        "device_profile": None if device is None else dataclasses.asdict(device),
        "implementations": {one.name: one.as_json() for one in measured},
        "ratios": comparisons(measured),
    }


def write_profile(folder: Path, measured: Sequence[Measured], request: Mapping, device: Device | None) -> Path:
    """Writes what was measured; an earlier profile there is replaced.

    Raises:
        ValueError: `folder` is a file, or has other things in it.
    """
    check_folder(folder)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder.absolute()) as temporary:
        for one in measured:
            (temporary / f"trace_{one.name}.json").write_text(one.trace, encoding="utf-8")
            if one.memory_snapshot is not None:
                (temporary / f"memory_{one.name}.pickle").write_bytes(one.memory_snapshot)
        text = json.dumps(profile_json(measured, request, device), indent=1)
        (temporary / PROFILE_NAME).write_text(text + "\n", encoding="utf-8")
        (temporary / REPORT_NAME).write_text(report_html(measured, request, device), encoding="utf-8")
    return folder

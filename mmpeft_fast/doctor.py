"""What this machine has and what the package makes of it: versions, devices, and the provider of every op and why."""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil

from mmpeft_fast import __version__

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate")


# Libraries whose storage formats of frozen weights can be read, and those formats.
FORMATS = {"bitsandbytes": "nf4, fp4, int8 (training on a CPU)", "torchao": "int8 and float8, weight-only"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `mmpeft-fast doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    """Prints the diagnosis as a table or as JSON; returns 0."""
    report = diagnosis()
    print(json.dumps(report, indent=2) if args.json else _table(report))
    return 0


def versions() -> dict[str, str | None]:
    """Versions of Python, of this package and of those it stands on; None for one that is not installed."""
    found = {"python": platform.python_version(), "mmpeft-fast": __version__}
    return found | {name: _version(name) for name in PACKAGES}


def device_name(device_type: str) -> str:
    """The name people know a device by: the GPU's own name, or the CPU's model.

    Args:
        device_type: "cpu" or "cuda" (the current CUDA device).
    """
    import torch

    return torch.cuda.get_device_name() if device_type == "cuda" else _cpu_name()


def diagnosis() -> dict:
    """Everything `doctor` shows, ready for JSON.

    Returns:
        keys `versions`, `cuda` (version torch was built with, or None), `compilers` (name -> path or None), `threads`,
        `devices` (each with `name`, `type`, `memory_bytes`), `providers` (what runs by default: each with `device`,
        `op`, `provider`, `reason`), `formats` (libraries whose packed weights can be read: each with `library`,
        `version` or None, `formats`) and `available_providers` (what `mmpeft_fast.provider` takes, and its state).
    """
    import torch

    from mmpeft_fast.ops import available_providers, provider_report

    devices = _devices()
    return {
        "versions": versions(),
        "cuda": torch.version.cuda,
        "compilers": {name: shutil.which(name) for name in ("c++", "nvcc")},
        "threads": torch.get_num_threads(),
        "devices": devices,
        "providers": [
            {"device": device["type"], "op": op, "provider": provider, "reason": reason}
            for device in devices
            for op, provider, reason in provider_report(device["type"])
        ],
        "formats": [
            {"library": library, "version": _version(library), "formats": formats}
            for library, formats in FORMATS.items()
        ],
        "available_providers": dict(available_providers()),
    }


def _devices() -> list[dict]:
    import torch

    devices = [{"type": "cpu", "name": _cpu_name(), "memory_bytes": _cpu_memory_bytes()}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"type": f"cuda:{index}", "name": properties.name, "memory_bytes": properties.total_memory})
    return devices


def _cpu_name() -> str:
    """The model line of /proc/cpuinfo where there is one, else what platform knows."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_memory_bytes() -> int | None:
    """Physical memory; None where the system does not say (Windows has no sysconf)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _table(report: dict) -> str:
    lines = ["Versions"]
    lines += _columns([(name, version or "not installed") for name, version in report["versions"].items()])
    lines += ["", "Machine"]
    lines += _columns(
        [(device["type"], f"{device['name']}, {_gib(device['memory_bytes'])}") for device in report["devices"]]
        + [("threads", str(report["threads"])), ("CUDA", report["cuda"] or "torch was built without it")]
        + [(name, path or "not found (not needed)") for name, path in report["compilers"].items()]
    )
    lines += ["", "Providers, by default"]
    lines += _columns([(row["device"], row["op"], row["provider"], row["reason"]) for row in report["providers"]])
    lines += ["", "Storage formats of frozen weights that can be read"]
    lines += _columns(
        [(row["library"], row["version"] or "not installed", row["formats"]) for row in report["formats"]]
    )
    lines += ["", "Providers that mmpeft_fast.provider(name) takes"]
    lines += _columns(list(report["available_providers"].items()))
    return "\n".join(lines)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows as aligned, indented lines."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _gib(size_bytes: int | None) -> str:
    return "memory unknown" if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"

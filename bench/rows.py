"""One measurement, one row: what ran, on what, how long, and from which commit."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from mmpeft_fast.doctor import device_name, versions


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Times functions in turn, round after round, so that they see the same machine; milliseconds by name."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_idx in range(warmup + rounds):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if round_idx >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def quantiles(times_ms: list[float]) -> dict[str, float]:
    p20, p50, p80 = (
        torch.tensor(times_ms, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    )
    return {"p50_ms": p50, "p20_ms": p20, "p80_ms": p80}


def _git(*arguments: str) -> str:
    """What git says of this folder; nothing where there is no git or no repository."""
    if shutil.which("git") is None:
        return ""
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return result.stdout.strip() if result.returncode == 0 else ""


def environment(device: str | None = None) -> dict[str, object]:
    """Device, versions and commit, the same for every row of a run. device: cpu or cuda; None: a GPU before a CPU."""
    cuda = torch.cuda.is_available() if device is None else device == "cuda"
    return {
        "device": device_name("cuda" if cuda else "cpu"),
        "driver": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        **versions(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSON-lines file; a last line that was cut off is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def append_rows(path: Path, rows: list[dict]) -> None:
    """Adds rows to a JSON-lines file; the file has all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text() if path.exists() else ""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(old + "".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)

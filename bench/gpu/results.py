"""gpu.json: one object with the machine and every section's rows, whole on disk at any time."""

import json
import time
from collections.abc import Callable
from pathlib import Path

from mmpeft_fast.atomic import write_text

# Rows come by the hundred; the file is rewritten at most this often between sections.
_SECONDS_BETWEEN_WRITES = 5.0


class Results:
    """`data` is what is in the file: {"machine": ..., "sections": {name: {"state", "seconds", "rows", ...}}}."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._clock, self._written = path, clock, clock()
        self.data: dict = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "sections": {}}
        self.write()

    def write(self) -> None:
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")
        self._written = self._clock()

    def section(self, name: str) -> dict:
        return self.data["sections"].setdefault(name, {"state": "running", "seconds": None, "rows": []})

    def rows(self, name: str) -> list[dict]:
        return self.data["sections"].get(name, {}).get("rows", [])

    def add(self, name: str, row: dict) -> None:
        self.section(name)["rows"].append(row)
        if self._clock() - self._written > _SECONDS_BETWEEN_WRITES:
            self.write()

"""Builds the native extension in place, where a compiler is there; whether that worked is a row."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.repository import ROOT

_ASK = "from mmpeft_fast.ops.csrc import why_no_cuda; raise SystemExit(why_no_cuda() is not None)"


def is_built() -> bool:
    """Whether an extension of an earlier build lies here that this torch can load, with its CUDA half; asked in a
    process of its own, because one that does not fit may end it."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", _ASK],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


class Build:
    """A build that runs beside other work; what it prints is appended to `log`.

    command: instead of the extension's own build.
    """

    def __init__(self, log: Path, command: list[str] | None = None, jobs: int = 1):
        self._started, self._log = time.monotonic(), log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command or [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True, env={**os.environ, "MAX_JOBS": str(jobs)},
            )  # fmt: skip

    def finish(self, seconds: float) -> dict[str, object]:
        """{"what", "ok", "seconds", "reason"} after waiting so long at most; the build is over then."""
        try:
            code = self._process.wait(timeout=max(0.0, seconds))
            reason = None if code == 0 else f"status {code}; see {self._log.name}"
        except subprocess.TimeoutExpired:
            reason = f"not done after {time.monotonic() - self._started:.0f} s"
        finally:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        elapsed = time.monotonic() - self._started
        return {"what": "extension", "ok": reason is None, "seconds": elapsed, "reason": reason}

"""Where this repository is, what of it has to be importable though nothing is installed, and what lies beside it."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
# Compiled kernels of earlier runs. Both caches have sources, options and versions in their keys: what does not fit is
# not found.
_CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def make_importable() -> None:
    """Puts the repository and its source root kernels/ on the path, and makes `tests` this repository's folder.

    A package of that name elsewhere would win over our folder, which has no __init__.py.
    """
    for path in (ROOT / "kernels", ROOT):
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
    if "tests" not in sys.modules:
        package = ModuleType("tests")
        package.__path__ = [str(ROOT / "tests")]
        sys.modules["tests"] = package


def caches(folder: Path = ROOT / "build" / "gpu") -> dict[str, str]:
    """Variables that let worker processes share compiled kernels with each other and with later runs."""
    return {name: str(folder / kind) for name, kind in _CACHES.items()}


def commit() -> dict[str, object]:
    """{"commit", "dirty"} of the working tree; None each where git or the repository's history is not there."""
    if shutil.which("git") is None:
        return {"commit": None, "dirty": None}
    head, status = (_git(*arguments) for arguments in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain")))
    return {"commit": head, "dirty": None if head is None else bool(status)}


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None

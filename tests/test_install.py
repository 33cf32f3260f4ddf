"""What a fresh clone relies on: the lock file, the source roots, and the guard against an old Python."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)==(?P<version>[A-Za-z0-9.]+)(; [a-z_]+ == \"[a-z]+\")?")


def pins(lock: str = "requirements-dev.lock") -> dict[str, str]:
    lines = [line for line in (ROOT / lock).read_text().splitlines() if not line.startswith("#")]
    matches = [PIN.fullmatch(line) for line in lines]
    odd = [line for line, match in zip(lines, matches) if not match]
    assert not odd, f"expected name==version in every line of the lock, got {odd}"
    return {canonical(match["name"]): match["version"] for match in matches}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_everything_the_package_asks_for():
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["study"], *extras["dev"], "setuptools"]
    names = {canonical(re.match(r"[A-Za-z0-9_.-]+", line)[0]) for line in asked}
    assert names <= pins().keys()
    assert pins()["torch"] == "2.13.0"  # no local version: the published wheel differs per platform


def test_the_lock_of_gpu_users_pins_what_they_have():
    theirs = pins("requirements-gpu.lock")
    wanted = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}
    assert wanted.items() <= theirs.items()
    assert tuple(map(int, theirs["numpy"].split(".")[:2])) < (2, 4)  # the interpreter of triton 3.6
    asked = [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["study"],
        "pytest",
        "pytest-xdist",
        "hypothesis",
    ]
    assert {canonical(re.match(r"[A-Za-z0-9_.-]+", line)[0]) for line in asked} <= theirs.keys()


def test_source_roots_are_what_setup_packages():
    assert (ROOT / "kernels" / "mmpeft_kernels" / "__init__.py").exists()
    undeclared = [
        path.parent for path in (ROOT / "mmpeft_fast").rglob("*.py") if not (path.parent / "__init__.py").exists()
    ]
    assert not undeclared, "a folder without __init__.py would not be installed"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("python", ["an old one", "a missing one"])
def test_make_refuses_an_old_or_missing_python(tmp_path, python):
    """One sentence, and no environment left behind."""
    for name in ("Makefile", "requirements-dev.lock", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    interpreter = tmp_path / "python"
    if python == "an old one":
        # Fails the version check, and names its version when asked for it.
        interpreter.write_text('#!/bin/sh\ncase "$2" in *exit*) exit 1;; *) echo 3.9.2;; esac\n')
        interpreter.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", "lint", f"PYTHON={interpreter}"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: Python 3.11 or newer is needed" in done.stderr
    assert ("3.9.2" in done.stderr) == (python == "an old one")
    assert not (tmp_path / ".venv").exists()

"""`mmpeft-fast bench`: the door to the repository's folder `bench`, which is not part of an installed package."""

import argparse
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sub-commands of `mmpeft-fast bench`. Raises ValueError outside of a checkout."""
    _command().add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the sub-command; its exit status."""
    # torch's tracer would write a line at every start and stop; it reads this when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    return _command().run(args)


def _command() -> ModuleType:
    """`bench.suite.command` of this checkout, whatever else is called bench on the path."""
    folder = Path(__file__).parents[1] / "bench"
    if "bench" not in sys.modules:
        if not (folder / "suite" / "command.py").is_file():
            raise ValueError(
                "bench: expected a checkout of the repository, which has the benchmarks in its folder bench; "
                f"this package was installed without it, to {Path(__file__).parent}"
            )
        spec = importlib.util.spec_from_file_location(
            "bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench"] = module
        spec.loader.exec_module(module)
    return importlib.import_module("bench.suite.command")

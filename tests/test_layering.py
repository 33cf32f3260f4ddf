"""The package's layers, read from its imports: everything imports downward only."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mmpeft_fast"
CORE = {"methods", "models", "layers", "ops", "mmpeft_kernels"}
PEFT_MODEL = {"peft_model", "fusion", "verify", "small_batches", "hf_peft", "quantised", "stored", "torchao_weights"}
# Leaves that every part may import.
SHARED = {
    "atomic",
    "closeness",
    "contexts",
    "documents",
    "dtypes",
    "fields",
    "json_text",
    "labels",
    "measure",
    "memory_errors",
    "pages",
    "patch_grids",
    "placement",
    "version",
}

# part -> the parts it may import, itself and SHARED aside. A part is a sub-package or a module of mmpeft_fast.
ALLOWED = {
    "cli": {"study", "plan", "profiling", "train", "stored", "doctor", "benchmarks", "version", "plugins"},
    "__main__": {"cli"},
    "study": {"plan", "doctor", "train", "data", "plugins"} | PEFT_MODEL | CORE,
    "plan": {"doctor", "train", "data"} | PEFT_MODEL | CORE,
    "profiling": {"plan", "doctor", "train", "data"} | PEFT_MODEL | CORE,
    "train": {"data", "doctor"} | PEFT_MODEL | {"methods", "models"},
    "data": set(),
    "doctor": {"ops"},
    **dict.fromkeys(PEFT_MODEL, PEFT_MODEL | CORE),
    "hf_trainer": {"peft_model", "small_batches"},
    "functional": {"ops"},
    "methods": {"layers", "ops"},
    "models": {"layers", "ops"},
    "layers": {"ops"},
    "ops": {"mmpeft_kernels"},
    "mmpeft_kernels": set(),
    "shipped": {"fusion", "models", "layers", "quantised"},
    "benchmarks": set(),
    "atomic": set(),
    "placement": set(),
    "plugins": set(),
    "contexts": set(),
    "documents": set(),
    "patch_grids": set(),
    "dtypes": set(),
    "labels": set(),
    "fields": set(),
    "json_text": set(),
    "measure": set(),
    "memory_errors": set(),
    "pages": set(),
    "closeness": set(),
}
SOURCES = sorted(path for root in (PACKAGE, ROOT / "kernels" / "mmpeft_kernels") for path in root.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part a source file belongs to."""
    if PACKAGE not in path.parents:
        return "mmpeft_kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(source: str) -> set[str]:
    """The parts that a source imports anywhere, also inside functions; `version` stands for the package's root."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, *rest = name.split(".")
            if root == "mmpeft_kernels":
                parts.add(root)
            elif root == "mmpeft_fast":
                first = rest[0] if rest else "version"
                parts.add(ROOT_NAMES.get(first, first))
    return parts


def root_names() -> dict[str, str]:
    """What `from mmpeft_fast import NAME` really imports: the part that the root's table of homes names."""
    import mmpeft_fast

    return {**{name: home.split(".")[0] for name, home in mmpeft_fast._HOMES.items()}, "__version__": "version"}


ROOT_NAMES = root_names()


def test_the_reader_sees_every_form_of_import():
    source = "import mmpeft_fast.ops.x\ndef f():\n    from mmpeft_fast.train import y\n"
    source += "    from mmpeft_fast import fuse, methods"
    assert imported_parts(source) == {"ops", "train", "peft_model", "methods"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_downward_only(path):
    part = part_of(path)
    if part == "__init__":
        return
    assert part in ALLOWED, f"{part} has no place among the layers; give it one"
    wrong = imported_parts(path.read_text()) - ALLOWED[part] - SHARED - {part}
    assert not wrong, f"{path.relative_to(ROOT)} is of {part} and must not import {sorted(wrong)}"


def test_the_root_imports_nothing_of_ours_by_itself():
    assert not imported_parts((PACKAGE / "__init__.py").read_text())


def test_kernels_is_no_package_of_ours():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # From the repository's root Python may see an empty namespace; transformers must not take it for the real package.
    code = "from transformers.utils.import_utils import is_kernels_available; assert not is_kernels_available()"
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None:
        pytest.skip("the real package `kernels` is installed")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_command_line_waits_for_no_heavy_import():
    code = (
        "import sys, mmpeft_fast.cli, mmpeft_fast.study.command, mmpeft_fast.doctor\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate', 'numpy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

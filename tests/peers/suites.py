"""The suites, what they need, and how a process runs one."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft

import mmpeft_fast
from tests.peers.hub import write_hub

_PEFT = ("test_decoder_models", "test_initialization", "test_mixed", "test_lora_variants", "test_tuners_utils")
_TRANSFORMERS = ("llama", "mistral", "qwen2", "qwen3", "llava", "qwen2_vl")
# What the suites import beyond this project's requirements: module and distribution.
NEEDED = {
    "parameterized": "parameterized", "scipy": "scipy", "attr": "attrs", "diffusers": "diffusers",
    "requests": "requests", "importlib_metadata": "importlib_metadata", "zipp": "zipp", "urllib3": "urllib3",
    "certifi": "certifi",
    "charset_normalizer": "charset-normalizer", "idna": "idna", "httpx": "httpx",
}  # fmt: skip
_HERE = Path(__file__).parent
_ROOT = Path(mmpeft_fast.__file__).parent.parent

# Runs pytest with these arguments in a folder; its exit code.
Launch = Callable[[list[str], Path], int]


@dataclass(frozen=True)
class Suite:
    """One file of tests. root: the folder that it is run from."""

    name: str
    root: Path
    file: Path

    def __str__(self) -> str:
        return self.name


def find(output: Path, checkout: Path | None) -> list[Suite]:
    """The suites that can be had; says of the others why not."""
    _install_needed(output / "packages")
    print(f"{write_hub(output / 'hub')} models and adapters of the hub are replaced by random ones of the same kind")
    found = []
    root = _peft_source(output / "sources")
    if root is not None:
        found += [Suite(f"peft {name}", root, root / "tests" / f"{name}.py") for name in _PEFT]
    if checkout is None:
        print("transformers: not run: its tests are in no package; name a checkout: make peer-tests TRANSFORMERS=/path")
    else:
        for name in _TRANSFORMERS:
            file = checkout / "tests" / "models" / name / f"test_modeling_{name}.py"
            found.append(Suite(f"transformers {name}", checkout, file))
    for suite in found:
        if not suite.file.is_file():
            print(f"{suite}: not run: there is no {suite.file}")
    return [suite for suite in found if suite.file.is_file()]


def _pip(*arguments: object) -> str | None:
    """Runs pip; the last line of what went wrong, or None."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _install_needed(target: Path) -> None:
    """Puts what only the suites import into a folder of its own."""
    sys.path.append(str(target))
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        error = _pip("install", "--no-deps", "--target", target, *missing)
        if error is not None:
            print(f"what the suites import and is not here: {', '.join(missing)}: pip says: {error}")
        importlib.invalidate_caches()


def _peft_source(folder: Path) -> Path | None:
    """The unpacked source distribution of the installed version; None, and a sentence, where it cannot be had."""
    root = folder / f"peft-{peft.__version__}"
    if root.is_dir():
        return root
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    error = _pip(
        "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", part,
        f"peft=={peft.__version__}",
    )  # fmt: skip
    archives = list(part.glob("peft-*.tar.gz"))
    if error is not None or not archives:
        print(f"peft {peft.__version__}: not run: its source distribution cannot be had: {error or 'nothing came'}")
        return None
    with tarfile.open(archives[0]) as archive:
        archive.extractall(part, filter="data")
    (part / root.name).rename(root)
    return root


def launcher(output: Path, workers: int) -> Launch:
    """Runs pytest in a process of its own, which ends with this one."""
    places = [_HERE, _ROOT, output / "packages", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, places)),
        "HF_HUB_CACHE": str(output / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    is_parallel = importlib.util.find_spec("xdist") is not None and workers > 1
    parallel = ["-n", str(workers), "--dist", "worksteal"] if is_parallel else []

    def launch(arguments: list[str], folder: Path) -> int:
        command = [sys.executable, "-m", "pytest", *parallel, *arguments]
        with open(output / "pytest.log", "ab") as log:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
            try:
                return process.wait()
            finally:
                if process.poll() is None:
                    _end(process)

    return launch


def _end(process: subprocess.Popen) -> None:
    for sign in (signal.SIGINT, signal.SIGKILL):
        os.killpg(process.pid, sign)
        try:
            process.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue

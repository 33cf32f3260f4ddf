"""Every kernel in Triton's interpreter against the torch provider.

The interpreter is chosen when Triton is first imported, which other tests of this process have done, so the checks run
in processes of their own: two, because starting one costs as much as several files of checks. Never bf16: the
interpreter computes its dot products wrongly and silently.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import triton

ROOT = Path(__file__).parents[2]
FILES = sorted((Path(__file__).parent / "interpreted").glob("check_*.py"))


@pytest.mark.parametrize("part", [0, 1])
def test_kernels_in_the_interpreter(part):
    if numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0" and triton.__version__.startswith("3.6."):
        pytest.fail(
            f"the interpreter of triton {triton.__version__} needs numpy below 2.4, this is {numpy.__version__}; "
            "install requirements-gpu.lock",
            pytrace=False,
        )
    source_roots = [str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(source_roots)}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, FILES[part::2])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_has_its_checks():
    """But for Gluon's, which the interpreter cannot run: a GPU has to."""
    sources = {path.stem: path.read_text() for path in (ROOT / "kernels" / "mmpeft_kernels").glob("*.py")}
    kernels = {name for name, text in sources.items() if "_kernel[" in text and "@gluon.jit" not in text}
    assert kernels <= {path.stem.removeprefix("check_") for path in FILES}

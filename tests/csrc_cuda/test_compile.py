"""The CUDA kernels compiled for sm_80 and sm_90a without a GPU: what they need and which instructions they became; the
torch entries compiled against the headers of the torch that is here, a CPU build included, and what they refuse."""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from mmpeft_kernels import aot

from tests.csrc_cuda.emulation import CUDA_SOURCES, ROOT

GEMM = "lowrank_gemm_sm90.cu"
BUILDS = [("90a", GEMM), ("80", "dy_pass.cu"), ("90a", "dy_pass.cu")]
# Registers of a thread: 65536 a multiprocessor, shared by the threads of a block (8-register steps).
REGISTER_LIMITS = {GEMM: 168, "dy_pass.cu": 255}
# As torch compiles CUDA sources.
TORCH_FLAGS = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
FLAGS = ("-std=c++20", "-O3", "-Xptxas", "-v", *(f"-D__CUDA_NO_{flag}__" for flag in TORCH_FLAGS))


class Build(NamedTuple):
    log: str
    cubin: Path

    def kernels(self) -> dict[str, tuple[int, int]]:
        """Registers and spilled bytes a thread of every kernel."""
        pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+)"
        found = re.findall(pattern, self.log, re.DOTALL)
        return {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found}

    def listings(self) -> list[list[str]]:
        """The instructions of every kernel."""
        sass = aot.sass(self.cubin.read_bytes())
        return [re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.+?) *;", part) for part in sass.split("Function : ")[1:]]

    def opcodes(self) -> set[str]:
        """Opcodes with their modifiers, without predicates."""
        return {re.sub(r"^@\S+ ", "", line).split()[0] for listing in self.listings() for line in listing}


@pytest.fixture(scope="module")
def builds(nvcc, tmp_path_factory) -> dict[tuple[str, str], Build]:
    """Every build of this file, once, two at a time."""
    folder = tmp_path_factory.mktemp("cubin")

    def compile_one(key):
        arch, name = key
        cubin = folder / f"{name}.{arch}.cubin"
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, *FLAGS, target, "-cubin", str(CUDA_SOURCES / name), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return key, Build(result.stdout + result.stderr, cubin)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(compile_one, BUILDS))


@pytest.mark.parametrize(("arch", "name"), BUILDS)
def test_nothing_spills_and_registers_are_within_limits(builds, arch, name):
    build = builds[arch, name]
    assert build.kernels(), build.log
    for kernel, (registers, spilled) in build.kernels().items():
        assert spilled == 0, f"{kernel} spills {spilled} bytes"
        assert registers <= REGISTER_LIMITS[name], f"{kernel} takes {registers} registers"
    assert "warning" not in build.log.lower(), build.log


def test_the_gemm_became_tma_wgmma_and_barriers(builds):
    build = builds["90a", GEMM]
    instructions = build.opcodes()
    for n in (128, 256):
        for dtype in ("", ".BF16"):
            assert f"HGMMA.64x{n}x16.F32{dtype}" in instructions
    for wanted in ("UTMALDG", "UTMASTG", "USETMAXREG", "SYNCS", "WARPGROUP"):
        assert any(instruction.startswith(wanted) for instruction in instructions), wanted
    assert "(C75" not in build.log, "the compiler serialises wgmma or adds to its order"


def test_the_gemms_warpgroups_stay_within_the_registers_that_they_leave_each_other(builds):
    """setmaxnreg: beyond 40 registers the producer would read what is no longer its own."""
    for listing in builds["90a", GEMM].listings():
        given_up = next(i for i, line in enumerate(listing) if line.startswith("USETMAXREG.DEALLOC"))
        for part, limit in ((listing[:given_up], 232), (listing[given_up:], 40)):
            used = {int(number) for line in part for number in re.findall(r"\bR(\d+)\b", line)}
            assert max(used) < limit, f"R{max(used)} of {limit} registers"


@pytest.mark.parametrize(("arch", "name"), [build for build in BUILDS if build[1] != GEMM])
def test_products_run_on_tensor_cores(builds, arch, name):
    instructions = builds[arch, name].opcodes()
    assert {"HMMA.16816.F32", "HMMA.16816.F32.BF16"} <= instructions
    assert any(instruction.startswith("LDSM.16") for instruction in instructions)
    assert any(instruction.startswith("LDGSTS") for instruction in instructions), "cp.async"


@pytest.fixture(scope="module")
def entries(toolkit_include, tmp_path_factory) -> Path:
    """The torch entries as one object: nearly all of the time goes into torch's headers."""
    folder = tmp_path_factory.mktemp("entries")
    torch_include = Path(torch.__file__).parent / "include"
    # The one header that a CPU build of torch lacks.
    stub = folder / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.touch()
    source, built = folder / "entries.cpp", folder / "entries.o"
    source.write_text("".join(f'#include "{path}"\n' for path in sorted(CUDA_SOURCES.glob("*.cpp"))))
    includes = [torch_include, torch_include / "torch" / "csrc" / "api" / "include", toolkit_include]
    command = [shutil.which("g++"), "-std=c++20", "-O1", "-fPIC", "-c", "-Wall", "-Werror", f"-I{folder}"]
    command += [flag for path in includes for flag in ("-isystem", str(path))]
    result = subprocess.run([*command, str(source), "-o", str(built)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return built


def undefined(built: Path) -> list[str]:
    result = subprocess.run(["nm", "-u", str(built)], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in result.stdout.splitlines()]


def test_no_exception_begins_in_an_entry(entries):
    """Neither in the entries' own lines nor in what they inline: torch's own functions throw from torch's library."""
    assert not {"__cxa_throw", "__cxa_allocate_exception"} & set(undefined(entries))


REFUSALS = """
import sys
import torch
from mmpeft_fast.ops import csrc

torch.ops.load_library(sys.argv[1])
x, vector = torch.zeros(8, 64, dtype=torch.bfloat16), torch.zeros(64)
gemm = lambda x: (x, x, None, None, 1.0, [8], [0], True, None, None, None, x)
calls = {
    "lowrank_gemm_out": gemm(x),
    "dy_pass": (x, x, x, [64], [64], 1.0, "identity", True, True),
}
for name, arguments in calls.items():
    try:
        csrc.cuda_op(name, *arguments)
    except ValueError as error:
        print(name, error, sep=": ")
try:
    csrc.cuda_op("lowrank_gemm_out", *gemm(vector))
except ValueError as error:
    print(error)
"""


def test_what_an_entry_refuses_is_an_error_of_python(entries, tmp_path):
    """The ops loaded without kernels, without a GPU, and given what is on none: the process lives on."""
    # Names of C++ functions are names of C functions once they are mangled.
    missing = [name for name in undefined(entries) if "cuda" in name.lower() or "GPUTrace" in name]
    stubs, library = tmp_path / "stubs.c", tmp_path / "entries.so"
    stubs.write_text("void abort(void);\n" + "".join(f"void {name}(void) {{ abort(); }}\n" for name in missing))
    torch_library = Path(torch.__file__).parent / "lib"
    link = ["g++", "-shared", "-fPIC", "-o", library, entries, "-x", "c", stubs, f"-L{torch_library}"]
    subprocess.run([*link, "-lc10", "-ltorch_cpu"], check=True)
    result = subprocess.run([sys.executable, "-c", REFUSALS, library], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["lowrank_gemm_out", "dy_pass"]
    assert all("on a GPU, got" in line and "cpu" in line for line in lines), lines
    assert lines[2].startswith("lowrank_gemm: expected matrices x and weight on a GPU, got x [64] on cpu")

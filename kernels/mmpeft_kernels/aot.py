"""Ahead-of-time compilation of every launch in `resources.json`, and the table of what each needs on a GPU.

    python -m mmpeft_kernels.aot launches            rewrites the list of launches (needs torch, no GPU)
    python -m mmpeft_kernels.aot compile             compiles all of them and rewrites this Triton version's resources
    python -m mmpeft_kernels.aot check [--only TEXT] compiles those whose name contains TEXT and compares with the table

The last two need Triton alone: no GPU, no torch.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mmpeft_kernels.shared_memory import LIMITS

TABLE = Path(__file__).with_name("resources.json")
_MATRIX_INSTRUCTIONS = {"wgmma.mma_async": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma", "v_mfma_": "mfma"}


def kernel_of(name: str):
    """The JIT function `module:function` of this package."""
    module, function = name.split(":")
    return getattr(importlib.import_module(f"mmpeft_kernels.{module}"), function)


def compiled(launch: dict):
    """Triton's compiled kernel for one record of the table."""
    kernel = kernel_of(launch["kernel"])
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel,
        signature=launch["signature"],
        constexprs={(position[name],): value for name, value in launch["constants"].items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch["aligned"]},
    )
    is_amd = isinstance(launch["arch"], str)
    target = GPUTarget("hip", launch["arch"], 64) if is_amd else GPUTarget("cuda", launch["arch"], 32)
    return triton.compile(source, target=target, options=launch["options"])


def compile_launch(launch: dict) -> dict:
    """Compiles one record of the table and returns its resources.

    registers a thread, spilled bytes a thread, shared bytes a block, the matrix instructions (wgmma, tcgen05, mma,
    mfma or none) and whether tensor memory access is used.
    """
    kernel = compiled(launch)
    is_amd = "amdgcn" in kernel.asm
    assembly = kernel.asm["amdgcn" if is_amd else "ptx"]
    registers, spilled = _amd_registers(assembly) if is_amd else _nvidia_registers(kernel.asm["cubin"])
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": kernel.metadata.shared,
        "matrix_instructions": next((kind for text, kind in _MATRIX_INSTRUCTIONS.items() if text in assembly), "none"),
        "tma": "cp.async.bulk.tensor" in assembly,
    }


def _amd_registers(assembly: str) -> tuple[int, int]:
    """Vector registers and bytes of scratch memory (where spills go) a thread, from the kernel's metadata."""
    fields = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly))
    return int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"])


def _nvidia_registers(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (where spills go) a thread."""
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _dumped(cubin, "--dump-resource-usage")))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


def sass(cubin: bytes) -> str:
    """The machine code of a compiled NVIDIA kernel."""
    return _dumped(cubin, "--dump-sass")


def _dumped(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> Path:
    candidates = (
        Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump",
        Path("/usr/local/cuda/bin/cuobjdump"),
    )
    for path in candidates:
        if path.exists():
            return path
    raise RuntimeError(f"cuobjdump: expected it in one of {[str(path) for path in candidates]}, found none")


def faults(launch: dict, resources: dict) -> list[str]:
    """What disqualifies a launch on its devices, in words; empty when nothing does."""
    found = []
    if resources["spilled_bytes"]:
        found.append(f"spills {resources['spilled_bytes']} bytes a thread")
    for arch in (launch["arch"], *launch["also"]):
        if resources["shared_bytes"] > LIMITS[arch]:
            found.append(f"{resources['shared_bytes']} bytes of shared memory, limit {LIMITS[arch]} on {arch}")
    if launch["constants"].get("USE_TMA") and not resources["tma"]:
        found.append("no tensor memory access in a tile that asks for it")
    return found


def read_table() -> dict:
    """{"launches": {name: record}, "resources": {Triton version: {name: resources}}}."""
    return json.loads(TABLE.read_text())


def write_table(table: dict) -> None:
    """One line a record, replaced atomically."""
    lines = []
    for section in ("launches", "resources"):
        lines.append(f'"{section}": {{\n')
        if section == "launches":
            lines.append(_rows(table[section], " "))
        else:
            versions = [f' "{version}": {{\n{_rows(rows, "  ")} }}' for version, rows in sorted(table[section].items())]
            lines.append(",\n".join(versions) + "\n")
        lines.append("},\n" if section == "launches" else "}\n")
    path = TABLE.with_name(f"{TABLE.name}.{os.getpid()}")
    path.write_text("{" + "".join(lines) + "}\n")
    os.replace(path, TABLE)


def _rows(records: dict, indent: str) -> str:
    rows = [f"{indent}{json.dumps(name)}: {json.dumps(record)}" for name, record in sorted(records.items())]
    return ",\n".join(rows) + "\n"


def compile_all(launches: dict[str, dict], jobs: int | None) -> dict[str, dict]:
    """{name: resources} of launches {name: record}, compiled by so many processes."""
    with ProcessPoolExecutor(jobs) as pool:
        return dict(zip(launches, pool.map(compile_launch, launches.values()), strict=True))


def check(only: str = "", jobs: int | None = None) -> list[str]:
    """What does not fit its devices, and differences between the table and what compiles now. Sizes are compared where
    the table has this version of Triton."""
    table = read_table()
    known = table["resources"].get(triton.__version__, {})
    launches = {name: launch for name, launch in table["launches"].items() if only in name}
    found = []
    for name, resources in compile_all(launches, jobs).items():
        found += [f"{name}: {fault}" for fault in faults(launches[name], resources)]
        if known and known.get(name) != resources:
            found.append(f"{name}: the table has {known.get(name)}, got {resources}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mmpeft_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("launches", "compile", "check"))
    parser.add_argument("--only", default="", help="compile launches whose name contains this (check only)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    options = parser.parse_args(arguments)
    if options.command == "launches":
        from mmpeft_kernels.launches import record_launches

        table = read_table() if TABLE.exists() else {"resources": {}}
        write_table({"launches": record_launches(), "resources": table["resources"]})
        return 0
    if options.command == "check":
        found = check(options.only, options.jobs)
    else:
        table = read_table()
        rows = compile_all(table["launches"], options.jobs)
        write_table({**table, "resources": {**table["resources"], triton.__version__: rows}})
        found = [f"{name}: {fault}" for name, row in rows.items() for fault in faults(table["launches"][name], row)]
    print("\n".join(found) or "ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

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
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TABLE = Path(__file__).with_name("resources.json")
# Bytes of shared memory that one block may have, by compute capability (CUDA programming guide, table of limits).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_WARP_SIZE = 32


def kernel_of(name: str):
    """The JIT function `module:function` of this package."""
    module, function = name.split(":")
    return getattr(importlib.import_module(f"mmpeft_kernels.{module}"), function)


def compile_launch(launch: dict) -> dict:
    """Compiles one record of the table and returns its resources.

    registers a thread, spilled bytes a thread, shared bytes a block, the matrix instructions (wgmma, tcgen05, mma or
    none) and whether tensor memory access is used.
    """
    kernel = kernel_of(launch["kernel"])
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature=launch["signature"],
        constexprs={(position[name],): value for name, value in launch["constants"].items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch["aligned"]},
    )
    target = GPUTarget("cuda", launch["arch"], _WARP_SIZE)
    compiled = triton.compile(source, target=target, options=launch["options"])
    ptx = compiled.asm["ptx"]
    instructions = [name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx]
    registers, spilled = _registers(compiled.asm["cubin"])
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": instructions[0].split(".")[0] if instructions else "none",
        "tma": "cp.async.bulk.tensor" in ptx,
    }


def _registers(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory (where spills go) a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_cuobjdump()), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    fields = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])


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
    """What disqualifies a launch on its device, in words; empty when nothing does."""
    found = []
    if resources["spilled_bytes"]:
        found.append(f"spills {resources['spilled_bytes']} bytes a thread")
    if resources["shared_bytes"] > SHARED_LIMIT[launch["arch"]]:
        found.append(f"{resources['shared_bytes']} bytes of shared memory, limit {SHARED_LIMIT[launch['arch']]}")
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


def check(only: str = "") -> list[str]:
    """Differences between the table and what compiles now. Sizes are compared where the table has this version."""
    table = read_table()
    known = table["resources"].get(triton.__version__, {})
    found = []
    for name, launch in table["launches"].items():
        if only in name:
            resources = compile_launch(launch)
            found += [f"{name}: {fault}" for fault in faults(launch, resources)]
            if known and known.get(name) != resources:
                found.append(f"{name}: the table has {known.get(name)}, got {resources}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mmpeft_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("launches", "compile", "check"))
    parser.add_argument("--only", default="", help="compile launches whose name contains this (check only)")
    options = parser.parse_args(arguments)
    if options.command == "launches":
        from mmpeft_kernels.launches import record_launches

        table = read_table() if TABLE.exists() else {"resources": {}}
        write_table({"launches": record_launches(), "resources": table["resources"]})
        return 0
    if options.command == "check":
        found = check(options.only)
    else:
        table = read_table()
        rows = {name: compile_launch(launch) for name, launch in table["launches"].items()}
        write_table({**table, "resources": {**table["resources"], triton.__version__: rows}})
        found = [f"{name}: {fault}" for name, row in rows.items() for fault in faults(table["launches"][name], row)]
    print("\n".join(found) or "ok")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

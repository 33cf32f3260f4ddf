"""The CUDA kernels on the CPU: their sources compiled by g++ against `emulated/`, called by pointer on torch tensors.

The emulation follows the PTX ISA's words on shared memory, fragments, barriers and copies. It finds wrong indices,
missing waits and wrong barrier phases; it knows nothing of time, and cannot tell where the words were misread.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
CUDA_SOURCES = ROOT / "csrc" / "cuda"
KERNELS = ("lowrank_gemm_sm90.cu", "dy_pass.cu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "silu")


class Array(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("cols", ctypes.c_int),
        ("stride", ctypes.c_int64),
    )


def array(tensor: torch.Tensor | None) -> Array:
    """A vector counts as one row."""
    if tensor is None:
        return Array()
    matrix = tensor if tensor.dim() == 2 else tensor[None]
    assert matrix.stride(1) == 1 or matrix.shape[1] == 1
    return Array(matrix.data_ptr(), DTYPES.index(matrix.dtype), *matrix.shape, matrix.stride(0))


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def ints(values) -> ctypes.Array:
    return (ctypes.c_int * len(values))(*values)


def build(folder: Path, toolkit_include: Path, *flags: str) -> ctypes.CDLL:
    """Sources and stand-ins side by side in `folder`: a quoted include finds its own folder first."""
    for source in (*CUDA_SOURCES.iterdir(), *(Path(__file__).parent / "emulated").iterdir()):
        if source.suffix in (".h", ".cu", ".cuh") or source.name in ("driver.cpp", "runtime.cpp"):
            shutil.copy(source, folder)
    command = ["g++", "-std=c++17", "-O2", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    command += [*flags, "-x", "c++", "-include", "prelude.h", "-I.", "-isystem", str(toolkit_include), "-c"]
    objects = []
    processes = []
    for source in (*KERNELS, "driver.cpp", "runtime.cpp"):
        objects.append(f"{source}.o")
        run = [*command, source, "-o", objects[-1]]
        processes.append(subprocess.Popen(run, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0, output
    # A CUDA build of torch brings the real runtime, whose functions of the same names would come first.
    subprocess.run(["g++", "-shared", "-Wl,-Bsymbolic", *flags, "-o", "emulated.so", *objects], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "emulated.so"))


def _check(status: int) -> None:
    if status != 0:
        raise ValueError(f"launcher: expected status 0, got cudaError_t {status}")


class Kernels:
    """The launchers on CPU tensors. Every output starts as NaN, so that an element that nobody writes is found."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library

    def lowrank_gemm(
        self, x, weight, *, z=None, u=None, num_outs=None, ranks=None, transposed=True, scaling=1.0, bias=None,
        scale=None, residual=None, out=None, block_n=128, num_programs=2,
    ):  # fmt: skip
        num_out = weight.shape[0] if transposed else weight.shape[1]
        out = torch.full((x.shape[0], -(-num_out // 8) * 8), torch.nan, dtype=x.dtype) if out is None else out
        out = out[:, :num_out]
        num_outs = num_outs or [num_out]
        ranks = ranks or [0 if z is None else z.shape[1]]
        arrays = [array(tensor) for tensor in (x, weight, z, u, bias, scale, residual, out)]
        status = self.library.run_lowrank_gemm(
            *(ctypes.byref(item) for item in arrays), ints(num_outs), ints(ranks), len(num_outs), int(transposed),
            ctypes.c_float(scaling), block_n, num_programs,
        )  # fmt: skip
        _check(status)
        return out

    def dy_pass(
        self, dy, a, u, *, num_outs, ranks, scaling=1.0, activation="identity", rows_per_chunk=64, need_da=True,
        need_du=True,
    ):  # fmt: skip
        da = torch.full(a.shape, torch.nan, dtype=dy.dtype) if need_da else None
        du = torch.full(u.shape, torch.nan, dtype=u.dtype) if need_du else None
        arrays = [array(tensor) for tensor in (dy, a, u, da, du)]
        status = self.library.run_dy_pass(
            *(ctypes.byref(item) for item in arrays), ints(num_outs), ints(ranks), len(num_outs), max(ranks),
            rows_per_chunk, ACTIVATIONS.index(activation), ctypes.c_float(scaling),
        )  # fmt: skip
        _check(status)
        return da, du

    def grouped_tile_visits(self, num_tiles_m: int, num_tiles_n: int) -> torch.Tensor:
        visits = torch.zeros(num_tiles_m, num_tiles_n, dtype=torch.int32)
        self.library.count_grouped_tiles(num_tiles_m, num_tiles_n, pointer(visits))
        return visits

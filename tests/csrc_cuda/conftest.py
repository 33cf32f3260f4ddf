"""The CUDA toolkit where there is one, and what the tests here build with it once a run."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.csrc_cuda import emulation, gpu


def toolkit_of(nvcc: str | None) -> Path | None:
    """The toolkit's include folder, beside the compiler that `nvcc` is or starts."""
    candidates = [Path("/usr/local/cuda/include")]
    if nvcc is not None:
        candidates.insert(0, Path(nvcc).resolve().parent.parent / "include")
    return next((folder for folder in candidates if (folder / "cuda_runtime.h").is_file()), None)


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("nvcc is not installed: the CUDA kernels are not compiled")
    return found


@pytest.fixture(scope="session")
def toolkit_include() -> Path:
    folder = toolkit_of(shutil.which("nvcc"))
    if folder is None or shutil.which("g++") is None:
        pytest.skip("the CUDA toolkit's headers or g++ are not installed: the CUDA kernels are not emulated")
    return folder


@pytest.fixture(scope="session")
def emulated(tmp_path_factory, toolkit_include) -> emulation.Kernels:
    return emulation.Kernels(emulation.build(tmp_path_factory.mktemp("emulated"), toolkit_include))


@pytest.fixture(params=["emulated", "gpu"])
def kernels(request):
    """The kernels on the CPU and on the GPU, behind the same methods."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the CUDA kernels run in the emulation alone")
    if not gpu.is_built():
        pytest.skip("mmpeft_fast was installed without its CUDA kernels")
    if request.function.__name__.startswith("test_gemm") and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"the GEMM needs compute capability 9.0, not {torch.cuda.get_device_capability()}")
    return gpu.Kernels()

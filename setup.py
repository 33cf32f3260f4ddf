"""Builds two packages from one repository, mmpeft_fast from the root and mmpeft_kernels from the source root kernels/,
and the native extension mmpeft_fast._C where torch and a C++ compiler are there, with its CUDA half where torch is a
CUDA build and nvcc is there.

Without the extension the package is complete and runs on plain torch. MMPEFT_FAST_NO_EXTENSION=1 leaves it out;
MMPEFT_FAST_SANITIZE=1 builds it with the address and undefined-behaviour sanitizers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.errors import BaseError

ROOT = Path(__file__).parent
HOST_SOURCES = ["csrc/registration.cpp", "csrc/module.cpp", "csrc/snapshot.cpp"]
# Ampere and newer; sm_90a has the instructions of Hopper alone (wgmma, setmaxnreg).
NVCC_FLAGS = [
    "-O3", "-std=c++20", "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_80,code=compute_80",
]  # fmt: skip


def compiler() -> str | None:
    """The C++ compiler that torch's build takes."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build_options() -> dict:
    """setup's arguments that build the extension; none, with a line that says why, where it cannot be built."""
    if os.environ.get("MMPEFT_FAST_NO_EXTENSION") == "1":
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        return _without_extension(f"torch is not importable here ({error}); install with --no-build-isolation")
    if sys.platform != "linux" or compiler() is None:
        return _without_extension("it needs Linux and a C++ compiler")

    def extension(cuda_sources: list[str]):
        flags = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
        # at::parallel_for is compiled into each object; its OpenMP runtime is the one that torch has loaded.
        flags += ["-fopenmp", f'-DMMPEFT_TORCH_VERSION="{torch.__version__}"']
        link_flags = []
        if os.environ.get("MMPEFT_FAST_SANITIZE") == "1":
            sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"]
            flags += [*sanitizers, "-O1", "-g1", "-fno-omit-frame-pointer"]
            link_flags += sanitizers
        return (CUDAExtension if cuda_sources else CppExtension)(
            "mmpeft_fast._C",
            [*HOST_SOURCES, *_sources("csrc/cpu", "cpp"), *cuda_sources],
            include_dirs=[str(ROOT)],
            depends=[path.as_posix() for path in (ROOT / "csrc").rglob("*.h")],
            extra_compile_args={"cxx": flags, **({"nvcc": NVCC_FLAGS} if cuda_sources else {})},
            extra_link_args=link_flags,
            optional=True,
        )

    class Build(BuildExtension):
        """A compile that fails is a warning, not a broken install: first the CUDA half is given up, then the rest."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except (RuntimeError, OSError, BaseError, subprocess.SubprocessError) as error:
                reason = f"its compile failed ({str(error).splitlines()[0]})"
                if not any(source.endswith(".cu") for source in self.extensions[0].sources):
                    _without_extension(reason)
                    return
                print(f"warning: mmpeft-fast is built without its CUDA kernels: {reason}", file=sys.stderr, flush=True)
                # In place: setuptools has noted on this object where its result belongs.
                vars(self.extensions[0]).update(vars(extension([])))
                self.build_extensions()

    cuda_sources = []
    if torch.version.cuda is not None and CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        cuda_sources = [*_sources("csrc/cuda", "cpp"), *_sources("csrc/cuda", "cu")]
    return {"ext_modules": [extension(cuda_sources)], "cmdclass": {"build_ext": Build}}


def _sources(folder: str, suffix: str) -> list[str]:
    """Every source with this suffix below a folder; setuptools wants them relative to setup.py."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(f"*.{suffix}"))


def _without_extension(reason: str) -> dict:
    print(f"warning: mmpeft-fast is installed without its native extension: {reason}", file=sys.stderr, flush=True)
    return {}


# kernels/ itself has no __init__.py and is never packaged: Hugging Face publishes a package of that name.
setup(
    packages=find_packages(include=["mmpeft_fast", "mmpeft_fast.*"]) + find_packages("kernels"),
    package_dir={"mmpeft_fast": "mmpeft_fast", "mmpeft_kernels": "kernels/mmpeft_kernels"},
    package_data={
        "mmpeft_fast.pages": ["*.css", "*.js"],
        "mmpeft_fast.layers": ["*.json"],
        "mmpeft_kernels": ["*.json", "rates/*.json", "tuned/*.json"],
    },
    **build_options(),
)

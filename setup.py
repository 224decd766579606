"""Build the native libraries that can be built here, and report why the others cannot.

ZSU_FAST_CPP and ZSU_FAST_CUDA: auto (default, build if possible), 1 (fail unless it builds) or 0
(do not build). `csrc/README.md` describes the sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Extension, setup

ARCHITECTURES = "8.0;9.0;10.0+PTX"  # overridden by TORCH_CUDA_ARCH_LIST
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # one build loads in torch 2.11 and later


def setting(name: str) -> str:
    """Returns the environment variable ``name``, one of auto, 0 and 1."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name} must be auto, 0 or 1, not {value!r}")
    return value


def log(text: str) -> None:
    print(f"zsu_fast build: {text}", file=sys.stderr, flush=True)


def toolkit() -> Path | None:
    """Returns a CUDA toolkit that can compile and link.

    nvcc on PATH may be a wrapper script, so ask it where its toolkit is.
    """
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parents[1]))
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
        )
        for line in dryrun.stderr.splitlines():
            if line.startswith("#$ TOP="):
                candidates.append(line.removeprefix("#$ TOP="))
    for home in filter(None, candidates):
        root = Path(home).resolve()
        has_runtime = any((root / lib / "libcudart.so").exists() for lib in ("lib64", "lib"))
        if (root / "bin" / "nvcc").exists() and has_runtime:
            return root
    return None


def why_no_cuda(torch_cuda: str | None, home: Path | None) -> str | None:
    """Returns why the CUDA library cannot be built; None if it can."""
    if torch_cuda is None:
        return "this torch is built without CUDA"
    if home is None:
        return "no CUDA toolkit with bin/nvcc and libcudart.so (set CUDA_HOME)"
    version = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    if version.returncode or f"release {torch_cuda.split('.')[0]}." not in version.stdout:
        return f"nvcc in {home} is not CUDA {torch_cuda.split('.')[0]}, which torch was built with"
    return None


def extensions(cuda: str, home: Path | None) -> list[Extension]:
    """Returns the C++ extension, and the CUDA extension if it is wanted and can be built."""
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-Wno-psabi", STABLE_ABI]
    found = [
        CppExtension(
            "zsu_fast._C_cpu",
            ["csrc/ops.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))],
            extra_compile_args={"cxx": cxx},
            extra_link_args=["-Wl,-s"],
            py_limited_api=True,
        )
    ]
    reason = why_no_cuda(torch.version.cuda, home)
    if cuda == "1" and reason:
        sys.exit(f"ZSU_FAST_CUDA=1 but {reason}")
    if cuda == "0" or reason:
        log(f"no CUDA library: {reason or 'ZSU_FAST_CUDA=0'}")
        return found
    return [
        *found,
        CUDAExtension(
            "zsu_fast._C_cuda",
            sorted(str(p) for p in Path("csrc/cuda").glob("*.cu")),
            extra_compile_args={
                "cxx": [*cxx, "-DUSE_CUDA"],
                "nvcc": ["-O3", "-lineinfo", "--threads=2", "-DUSE_CUDA", STABLE_ABI],
            },
            extra_link_args=["-Wl,-s"],
            py_limited_api=True,
        ),
    ]


def build_one_by_one(required: set[str]) -> type[Command]:
    """Returns a build_ext that drops an extension whose build fails, unless it is required."""
    from torch.utils.cpp_extension import BuildExtension

    class OneByOne(BuildExtension):
        def build_extensions(self) -> None:
            built = []
            for extension in self.extensions[:]:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:
                    if extension.name in required:
                        raise
                    log(f"{extension.name} left out, its build failed: {error}")
            self.extensions = built
            if not built:
                log("pure Python: the ops will run in plain torch")

    return OneByOne


def native() -> dict[str, object]:
    """Returns the arguments of setup() that build the libraries; none for a pure Python install."""
    cpp, cuda = setting("ZSU_FAST_CPP"), setting("ZSU_FAST_CUDA")
    if cpp == "0":
        log("ZSU_FAST_CPP=0: pure Python")
        return {}
    home = toolkit()
    if home:
        os.environ["CUDA_HOME"] = str(home)  # torch reads it when it is imported
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        if cpp == "1":
            raise
        log(f"torch cannot be imported ({error}): pure Python, the ops will run in plain torch")
        return {}
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    modes = {"zsu_fast._C_cpu": cpp, "zsu_fast._C_cuda": cuda}
    return {
        "ext_modules": extensions(cuda, home),
        "cmdclass": {
            "build_ext": build_one_by_one({n for n, mode in modes.items() if mode == "1"})
        },
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**native())

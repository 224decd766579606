"""Build the two native libraries, or fewer: what cannot be built is left out, and said.

ZSU_FAST_CPP, ZSU_FAST_CUDA = auto (default: build if possible) | 1 (must build) | 0 (do not).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ARCHITECTURES = "8.0;9.0;10.0+PTX"  # TORCH_CUDA_ARCH_LIST replaces it
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # one build loads in torch 2.11 and later


def wanted(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name} must be auto, 0 or 1, not {value!r}")
    return value


def say(text: str) -> None:
    print(f"zsu_fast build: {text}", file=sys.stderr, flush=True)


def toolkit() -> Path | None:
    """A CUDA toolkit that can compile and link. nvcc on PATH may be a wrapper script, so ask it."""
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
    if torch_cuda is None:
        return "this torch is built without CUDA"
    if home is None:
        return "no CUDA toolkit with bin/nvcc and libcudart.so (set CUDA_HOME)"
    version = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    if version.returncode or f"release {torch_cuda.split('.')[0]}." not in version.stdout:
        return f"nvcc in {home} is not CUDA {torch_cuda.split('.')[0]}, which torch was built with"
    return None


def native() -> dict[str, object]:
    """The arguments of setup() that build the libraries; none for a pure Python install."""
    cpp, cuda = wanted("ZSU_FAST_CPP"), wanted("ZSU_FAST_CUDA")
    if cpp == "0":
        say("ZSU_FAST_CPP=0: pure Python")
        return {}
    home = toolkit()
    if home:
        os.environ["CUDA_HOME"] = str(home)  # torch reads it when it is imported
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if cpp == "1":
            raise
        say(f"torch cannot be imported ({error}): pure Python, the ops will run in plain torch")
        return {}

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-Wno-psabi", STABLE_ABI]
    extensions = [
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
        say(f"no CUDA library: {reason or 'ZSU_FAST_CUDA=0'}")
    else:
        extensions.append(
            CUDAExtension(
                "zsu_fast._C_cuda",
                sorted(str(p) for p in Path("csrc/cuda").glob("*.cu")),
                extra_compile_args={
                    "cxx": [*cxx, "-DUSE_CUDA"],
                    "nvcc": ["-O3", "-lineinfo", "--threads=2", "-DUSE_CUDA", STABLE_ABI],
                },
                extra_link_args=["-Wl,-s"],
                py_limited_api=True,
            )
        )

    class OneByOne(BuildExtension):  # type: ignore[misc]
        """Extensions built one at a time: a failure costs that one only, unless it must build."""

        def build_extensions(self) -> None:
            built = []
            for extension in self.extensions[:]:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except Exception as error:
                    if (cuda if extension.name.endswith("cuda") else cpp) == "1":
                        raise
                    say(f"{extension.name} left out, its build failed: {error}")
            self.extensions = built
            if not built:
                say("pure Python: the ops will run in plain torch")

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": OneByOne},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":
    setup(**native())

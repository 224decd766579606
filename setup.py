"""Build the native libraries that can be built here, and report why the others cannot.

ZSU_FAST_CPP and ZSU_FAST_CUDA: auto (default, build if possible), 1 (fail unless it builds) or 0
(do not build). `csrc/README.md` describes the sources. Why a library is left out is written beside
where it would be, for `zsu_fast.doctor()`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Command, Extension, setup

ARCHITECTURES = "8.0;9.0;10.0+PTX"  # overridden by TORCH_CUDA_ARCH_LIST
CPU, CUDA = "zsu_fast._C_cpu", "zsu_fast._C_cuda"
# What is run in each library once it is built: an op that must refuse, by an exception.
REFUSALS = {
    CPU: "o.signed_cross_entropy(torch.zeros(2, 3), torch.tensor([0, 9]), torch.ones(2))",
    CUDA: "o._refuse(torch.zeros(2))",
}
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


def runtime_libraries() -> list[str]:
    """Returns what is linked before torch's libraries: with GCC on Linux, the C++ runtime.

    libc10 exports parts of the runtime that it was built with. Linked first, it would provide them,
    and exceptions and messages would be made by a mixture of two runtimes.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
    except OSError:  # no compiler: the build will say so
        return []
    gcc = "Free Software Foundation" in version.stdout
    return ["stdc++", "gcc_s"] if sys.platform == "linux" and gcc else []


def why_unusable(name: str, library: Path) -> str | None:
    """Returns why a library that was built must not be used; None if it may.

    In a process of its own, as it may die: with two C++ runtimes in one process, a native function
    that refuses its arguments can end the process instead of raising.
    """
    code = f"""
import sys, torch
try:
    torch.ops.load_library(sys.argv[1])
except OSError as error:  # as in a build for another machine: its import will give the reason
    sys.exit(print("it does not load here:", error))
o = torch.ops.zsu_fast
try:
    {REFUSALS[name]}
except RuntimeError as error:
    print("refuses:", error)
else:
    sys.exit("an op took arguments that it must refuse")
"""
    run = subprocess.run(
        [sys.executable, "-c", code, library.resolve()], capture_output=True, text=True, cwd=os.sep
    )
    if run.returncode == 0:
        log(f"{name} {run.stdout.strip()}")
        return None
    if run.returncode < 0:
        return f"the process dies of signal {-run.returncode} where an op refuses its arguments"
    return run.stderr.strip().rpartition("\n")[2] or f"its test ended with {run.returncode}"


def extensions(cuda: str, home: Path | None, left_out: dict[str, str]) -> list[Extension]:
    """Returns the C++ extension, and the CUDA extension if it is wanted and can be built.

    If it is wanted and can't be built, ``left_out`` gets the reason.
    """
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    strip = [] if sys.platform == "darwin" else ["-Wl,-s"]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-Wno-psabi", STABLE_ABI]
    found = [
        CppExtension(
            CPU,
            ["csrc/ops.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))],
            extra_compile_args={"cxx": cxx},
            extra_link_args=strip,
            libraries=runtime_libraries(),
            py_limited_api=True,
        )
    ]
    reason = why_no_cuda(torch.version.cuda, home)
    if cuda == "1" and reason:
        sys.exit(f"ZSU_FAST_CUDA=1 but {reason}")
    if cuda == "0" or reason:
        left_out[CUDA] = "ZSU_FAST_CUDA=0 when it was built" if cuda == "0" else str(reason)
        log(f"no CUDA library: {left_out[CUDA]}")
        return found
    return [
        *found,
        CUDAExtension(
            CUDA,
            sorted(str(p) for p in Path("csrc/cuda").glob("*.cu")),
            extra_compile_args={
                "cxx": [*cxx, "-DUSE_CUDA"],
                "nvcc": ["-O3", "-lineinfo", "--threads=2", "-DUSE_CUDA", STABLE_ABI],
            },
            extra_link_args=strip,
            libraries=runtime_libraries(),
            py_limited_api=True,
        ),
    ]


def build_one_by_one(required: set[str], left_out: dict[str, str]) -> type[Command]:
    """Returns a build_ext that drops an extension that can't be built or used, unless it is
    required, and writes the reasons, with those already in ``left_out``, beside the others.
    """
    from torch.utils.cpp_extension import BuildExtension

    broken: set[str] = set()

    class OneByOne(BuildExtension):
        def build_extensions(self) -> None:
            built = []
            for extension in self.extensions[:]:
                self.extensions = [extension]
                library = Path(self.get_ext_fullpath(extension.name))
                try:
                    super().build_extensions()
                    if reason := why_unusable(extension.name, library):
                        library.unlink()
                        raise RuntimeError(reason)
                    built.append(extension)
                except Exception as error:
                    if extension.name in required:
                        raise
                    left_out[extension.name] = f"its build failed: {error}"
                    broken.add(extension.name)
                    log(f"{extension.name} left out, {left_out[extension.name]}")
            self.extensions = built
            if not built:
                log("pure Python: the ops will run in plain torch")
            self.write_reasons(Path(self.get_ext_fullpath(CPU)).parent)

        def copy_extensions_to_source(self) -> None:
            super().copy_extensions_to_source()
            package = Path(__file__).parent / "zsu_fast"
            for name in broken:
                for stale in package.glob(f"{name.rpartition('.')[2]}.*so"):
                    stale.unlink()  # of another build
            self.write_reasons(package)

        def write_reasons(self, folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in (CPU, CUDA):
                file = folder / f"{name.rpartition('.')[2]}.left_out.txt"
                file.unlink(missing_ok=True)
                if name in left_out:
                    file.write_text(left_out[name] + "\n")

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
    label = os.environ.get("ZSU_FAST_VERSION_LABEL", "")  # of the version, such as cu130
    required = {name for name, mode in ((CPU, cpp), (CUDA, cuda)) if mode == "1"}
    left_out: dict[str, str] = {}
    return {
        "ext_modules": extensions(cuda, home, left_out),
        "cmdclass": {"build_ext": build_one_by_one(required, left_out)},
        "options": {
            "bdist_wheel": {"py_limited_api": "cp310"},
            "egg_info": {"tag_build": f"+{label}" if label else ""},
        },
    }


if __name__ == "__main__":
    setup(**native())

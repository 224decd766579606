"""The CUDA kernels without a GPU: their sources compiled for the CPU, where fibers emulate threads.

Runs the op tests again in a process that calls them for backend "cuda". `cuda_emulator/emulator.h`
says what this shows and what only the `gpu` tests can.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def cuda_headers() -> Path | None:
    """Returns a folder with CUDA's headers: of a toolkit, or of the packages that torch needs."""
    toolkits = [Path(os.environ.get("CUDA_HOME", "")), *Path("/usr/local").glob("cuda*")]
    folders = [home / "include" for home in toolkits]
    package = importlib.util.find_spec("nvidia")
    for place in (package.submodule_search_locations or []) if package else []:
        folders += Path(place).glob("*/include")
    return next((f for f in folders if (f / "cuda_bf16.h").exists()), None)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    compiler, headers = shutil.which("g++"), cuda_headers()
    if not compiler or not headers or not (ROOT / "csrc").exists() or sys.platform != "linux":
        pytest.skip("needs Linux, g++, the headers of CUDA and the sources of the kernels")
    torch_root = Path(torch.__file__).parent
    flags = [
        "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-trapping-math", "-Wno-psabi",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{torch_root}/include", f"-I{torch_root}/"
        "include/torch/csrc/api/include", "-isystem", str(headers),
    ]  # fmt: skip
    emulator = HERE / "cuda_emulator"
    objects = []
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    for source in [*(k for k in kernels if k.stem != "refuse"), emulator / "ops.cpp"]:
        objects.append(tmp_path / f"{source.name}.o")
        kind = (
            ["-include", str(emulator / "emulator.h"), "-x", "c++"]
            if source.suffix == ".cu"
            else []
        )
        run([compiler, *flags, *kind, "-c", str(source), "-o", str(objects[-1])])
    built = tmp_path / "emulated.so"
    run([compiler, "-shared", *map(str, objects), f"-L{torch_root}/lib", "-ltorch_cpu", "-lc10",
         "-o", str(built)])  # fmt: skip
    return built


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    return done.stdout


def test_cuda_kernels_emulated_on_the_cpu(library: Path) -> None:
    names = ("signed_cross_entropy", "masked_cross_entropy", "ascent_step")
    # autograd sees changes in place by what registers zsu_fast's ops, which emulated ones lack
    output = run(
        [sys.executable, "-m", "pytest", "-q", "-k", "emulated and not autograd_notices", "-p",
         "no:cacheprovider", *(str(HERE / f"test_{name}.py") for name in names)],
        ZSU_EMULATED=str(library),
    )  # fmt: skip
    passed = int(output.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1])
    assert passed >= 100, output[-500:]

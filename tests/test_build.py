"""The native libraries: built or explained, one per instruction set, and how they are installed."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import zsu_fast
from zsu_fast.ops import backends, library, reference
from zsu_fast.ops.schemas import SCHEMAS
from zsu_fast.runtime.doctor import doctor, render
from zsu_fast.version import VERSION

ROOT = Path(__file__).parents[1]
PACKAGE = Path(zsu_fast.__file__).parent


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter that imports this package."""
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=os.sep,
        env={**os.environ, "PYTHONPATH": path, **env},
    )  # fmt: skip


# ---- the libraries -------------------------------------------------------------------------------
def test_the_cpu_library_is_built_in_ci() -> None:
    if os.environ.get("CI") != "true" and not library.CPU.loaded:
        pytest.skip(f"not in CI, and {library.CPU.reason}")
    assert library.CPU.loaded, library.CPU.reason
    for name in SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"zsu_fast::{name}", "CPU")
    assert backends.best_backend("cpu")[0] == "cpp"


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_agree(name: str) -> None:
    """The schemas used without the library equal those in csrc/ops.cpp."""
    loaded = getattr(torch.ops.zsu_fast, name).default._schema
    assert str(loaded) == str(torch._C.parse_schema(f"zsu_fast::{name}{SCHEMAS[name]}"))
    if (ROOT / "csrc").exists():
        source = (ROOT / "csrc" / "ops.cpp").read_text()
        joined = re.sub(r'"\s*\n\s*"', "", source).replace('\\"', '"')
        assert f'm.def("{name}{SCHEMAS[name]}")' in re.sub(r"m\.def\(\s*", "m.def(", joined)


@pytest.mark.parametrize("lib", [library.CPU, library.CUDA], ids=lambda lib: lib.name)
def test_only_the_stable_abi_is_used(lib: library.NativeLibrary) -> None:
    """No C++ symbols of libtorch are used: they change with every release and fail to resolve."""
    if not lib.path or not shutil.which("nm"):
        pytest.skip(lib.reason or "no nm")
    run = subprocess.run(
        ["nm", "-D", "--undefined-only", lib.path], capture_output=True, text=True, check=True
    )
    symbols = [line.split()[-1] for line in run.stdout.splitlines()]
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols)
    cxx = [s for s in symbols if re.match(r"_ZT?[NVIS]K?(3c10|2at|5torch)", s)]
    assert not cxx


@pytest.mark.skipif(sys.platform != "linux", reason="about the linker of Linux")
@pytest.mark.parametrize("lib", [library.CPU, library.CUDA], ids=lambda lib: lib.name)
def test_one_runtime_throws_and_formats(lib: library.NativeLibrary) -> None:
    """pytorch#109923: libc10 exports iostreams of the libstdc++ that it was built with. A library
    that uses them may die where it should raise.
    """
    if not lib.path or not shutil.which("readelf") or not shutil.which("nm"):
        pytest.skip(lib.reason or "no readelf or nm")

    def output(*command: Any) -> str:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return run.stdout

    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d", lib.path))
    first = next(i for i, name in enumerate(needed) if name.startswith("libstdc++"))
    assert all(not name.startswith(("libc10", "libtorch")) for name in needed[:first])
    used = output("nm", "-D", "--undefined-only", lib.path)
    assert "basic_ostringstream" not in used
    assert "basic_stringstream" not in used
    unversioned = [line.split()[-1] for line in used.splitlines() if "@" not in line]
    assert [name for name in unversioned if name.startswith("_Z")] == []


def test_denormals_survive_the_import() -> None:
    """Linking with -ffast-math would flush them to zero in the whole process."""
    run = python(
        "import zsu_fast.ops, torch\n"
        "assert 5e-324 * 1.0 != 0.0\n"
        "assert (torch.tensor([1e-40]) * 0.5).item() != 0.0\n"
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    if not library.CPU.loaded:
        pytest.skip(str(library.CPU.reason))
    order = ["baseline", "avx2", "avx512"]
    if library.cpu_isa() not in order:
        pytest.skip(f"this CPU has {library.cpu_isa()} only")
    if order.index(isa) > order.index(str(library.cpu_isa())):
        pytest.skip(f"this CPU stops at {library.cpu_isa()}")
    run = python(
        "import torch\n"
        "from zsu_fast.ops import library, reference as r\n"
        f"assert library.cpu_isa() == {isa!r}, library.cpu_isa()\n"
        "torch.manual_seed(0)\n"
        "o = torch.ops.zsu_fast\n"
        "for dtype, tol in ((torch.float32, 1e-6), (torch.float64, 1e-13), (torch.float16, 1e-3),"
        " (torch.bfloat16, 8e-3)):\n"
        "  for classes in (1, 10, 37, 1000):\n"
        "    x, z = ((4 * torch.randn(9, classes)).to(dtype) for _ in range(2))\n"
        "    t, c = torch.randint(classes, (9,)), torch.randn(9)\n"
        "    f = torch.rand(classes) < .3; f[0] = False\n"
        "    X, Z = x.double(), z.double()\n"
        "    pairs = [(o.signed_cross_entropy(x, t, c), r.signed_cross_entropy(X, t, c)),\n"
        "      (o.masked_cross_entropy(x, z, f, c), r.masked_cross_entropy(X, Z, f, c))]\n"
        "    for (loss, dx), (Loss, Dx) in pairs:\n"
        "      torch.testing.assert_close(loss.double(), Loss, rtol=1e-5, atol=1e-5)\n"
        "      torch.testing.assert_close(dx.double(), Dx, rtol=tol, atol=tol)\n"
        "    d = dx.clone(); g = torch.tensor(-2., dtype=loss.dtype); o.scale_rows_(d, c, g)\n"
        "    torch.testing.assert_close(d, dx * -2)\n"
        "a = [torch.randn(5, 3, 9, 7) for _ in range(4)]; a[3].abs_()\n"
        "a += [torch.arange(5, dtype=torch.int32), torch.tensor([1, 1, 0, 1, 1]).bool(),\n"
        "  -torch.ones(3), torch.rand(3), torch.tensor([.1]), torch.tensor([.01])]\n"
        "b = [t.clone() for t in a]\n"
        "o.ascent_step_(*a, .9, .999, 1e-8)\n"
        "r.ascent_step_(*b, .9, .999, 1e-8)\n"
        "[torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-6) for u, v in zip(a, b)]\n",
        ZSU_FAST_CPU_ISA=isa,
    )
    assert run.returncode == 0, run.stderr


# ---- without the library -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pure_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies the package without native libraries."""
    folder = tmp_path_factory.mktemp("pure")
    shutil.copytree(
        PACKAGE, folder / "zsu_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return folder


def test_without_the_library_the_ops_run_and_warn_once(pure_python: Path) -> None:
    run = python(
        "import torch\n"
        "from zsu_fast import ops\n"
        "from zsu_fast.ops import library\n"
        f"assert library.__file__.startswith({str(pure_python)!r})\n"
        "x = torch.randn(4, 5, requires_grad=True)\n"
        "t, c = torch.tensor([0, 1, 2, 3]), torch.tensor([-1., 1., 0., 1.])\n"
        "for _ in range(3): ops.signed_cross_entropy(x, t, c).sum().backward()\n"
        "losses, d = torch.ops.zsu_fast.signed_cross_entropy(x.detach(), t, c)\n"
        "torch.testing.assert_close(x.grad, 3 * d)\n"
        "try: ops.signed_cross_entropy(x, t, c, backend='cpp')\n"
        "except ops.BackendUnavailable as error: print('explicit:', error)\n",
        PYTHONPATH=str(pure_python), ZSU_FAST_BACKEND="",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "explicit: backend 'cpp' on cpu: _C_cpu was not built" in run.stdout
    assert run.stderr.count("falling back to eager (cpp: _C_cpu was not built") == 1


def test_a_library_that_does_not_load_gives_a_reason(pure_python: Path) -> None:
    broken = pure_python / "zsu_fast" / "_C_cpu.abi3.so"
    broken.write_bytes(b"not a library")
    try:
        run = python(
            "from zsu_fast.ops import library, signed_cross_entropy\n"
            "assert not library.CPU.loaded\n"
            "print(library.CPU.reason)\n",
            PYTHONPATH=str(pure_python),
        )
    finally:
        broken.unlink()
    assert run.returncode == 0, run.stderr
    assert "_C_cpu.abi3.so does not load" in run.stdout


def test_why_a_library_was_left_out_is_its_reason(pure_python: Path) -> None:
    """setup.py writes it."""
    note = pure_python / "zsu_fast" / "_C_cpu.left_out.txt"
    note.write_text("its build failed: the process dies of signal 6\n")
    try:
        run = python(
            "from zsu_fast.runtime.doctor import render\nprint(render())",
            PYTHONPATH=str(pure_python),
        )
    finally:
        note.unlink()
    assert run.returncode == 0, run.stderr
    assert "was not built (its build failed: the process dies of signal 6)" in run.stdout


# ---- choosing ------------------------------------------------------------------------------------
def test_explicit_choices_run_or_raise() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(backends.BackendUnavailable, match="CUDA devices only"):
        backends.choose("signed_cross_entropy", cpu, "cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(backends.BackendUnavailable, match="triton"):
            backends.choose("signed_cross_entropy", cpu, "triton")
    with pytest.raises(ValueError, match="unknown backend"):
        backends.choose("signed_cross_entropy", cpu, "fortran")
    with backends.use_backend("eager"):
        chosen = backends.choose("signed_cross_entropy", cpu)
        assert chosen.__wrapped__ is reference.signed_cross_entropy
        with backends.use_backend("auto"):
            assert backends.forced_backend() is None
    assert backends.choose("signed_cross_entropy", cpu) is not chosen or not library.CPU.loaded


def test_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("eager", "eager"), ("auto", None)):
        monkeypatch.setenv("ZSU_FAST_BACKEND", value)
        module = importlib.util.module_from_spec(backends.__spec__)  # a fresh copy reads it
        backends.__spec__.loader.exec_module(module)
        assert module.forced_backend() == expected
    wrong = python("import zsu_fast.ops.backends", ZSU_FAST_BACKEND="fast")
    assert wrong.returncode != 0
    assert "unknown backend 'fast'" in wrong.stderr


def test_doctor_reports_the_state() -> None:
    report = doctor()
    assert report["torch"] == torch.__version__
    assert report["libraries"]["_C_cpu"]["loaded"] == library.CPU.loaded
    assert report["devices"]["cpu"]["chosen"] == backends.best_backend("cpu")[0]
    assert report["devices"]["cuda"]["present"] == torch.cuda.is_available()
    text = render(report)
    for word in ("cpp", "cuda", "triton", "eager", "compile", "_C_cpu", "_C_cuda", "is chosen"):
        assert word in text
    absent = {**report["libraries"]["_C_cpu"], "loaded": False, "reason": "lost"}
    assert "absent: lost" in render({**report, "libraries": {"_C_cpu": absent}})


# ---- installing ----------------------------------------------------------------------------------
def wheel(tmp_path: Path, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Builds a wheel from a copy of the sources; returns the names of its files."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no sources next to the tests")
    source = tmp_path / "source"
    keep = shutil.ignore_patterns("*.so", "__pycache__", "build", ".git", "*.egg-info", "tests")
    source.mkdir()
    for name in ("zsu_fast", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=keep)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "README.md").write_text("test\n")
    run = subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_wheel('.'))"],
        cwd=source, capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": "", "MAX_JOBS": "2", **env},
    )  # fmt: skip
    names = [n for w in source.glob("*.whl") for n in zipfile.ZipFile(w).namelist()]
    return run, names


@pytest.fixture(scope="module")
def build_script() -> ModuleType:
    """Loads setup.py as a module, to test its decisions without a build."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no sources next to the tests")
    spec = importlib.util.spec_from_file_location("zsu_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_toolkit(root: Path, release: str, runtime: bool = True) -> Path:
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    if runtime:
        (root / "lib64").mkdir()
        (root / "lib64" / "libcudart.so").touch()
    return root


def test_the_toolkit_must_match_torch(build_script: ModuleType, tmp_path: Path) -> None:
    """Without nvcc, without CUDA in torch, or with another CUDA major version: a reason."""
    assert "without CUDA" in build_script.why_no_cuda(None, None)
    assert "no CUDA toolkit" in build_script.why_no_cuda("13.0", None)
    home = fake_toolkit(tmp_path / "cuda", "12.4")
    assert "is not CUDA 13" in build_script.why_no_cuda("13.0", home)
    assert build_script.why_no_cuda("12.8", home) is None


def test_a_wrapper_on_the_path_is_no_toolkit(
    build_script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc on PATH may be a script whose folder has no libcudart, so linking would fail."""
    real = fake_toolkit(tmp_path / "real", "13.0")
    wrapper = fake_toolkit(tmp_path / "wrapper", "13.0", runtime=False)
    monkeypatch.setenv("CUDA_HOME", str(wrapper))
    monkeypatch.setenv("CUDA_PATH", str(real))
    assert build_script.toolkit() == real
    monkeypatch.setenv("CUDA_HOME", str(real))
    assert build_script.toolkit() == real


# ---- before a library is kept --------------------------------------------------------------------
def test_a_library_that_dies_where_it_refuses_is_left_out(
    build_script: ModuleType, tmp_path: Path
) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    library_that_dies = tmp_path / "dies.so"
    (tmp_path / "dies.c").write_text(
        "#include <stdlib.h>\n__attribute__((constructor)) void die(void) { abort(); }\n"
    )
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library_that_dies, tmp_path / "dies.c"], check=True
    )
    reason = build_script.why_unusable(build_script.CPU, library_that_dies)
    assert reason == "the process dies of signal 6 where an op refuses its arguments"


def test_a_library_that_refuses_or_is_for_another_machine_is_kept(
    build_script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.so"
    other.write_bytes(b"for another machine")
    assert build_script.why_unusable(build_script.CPU, other) is None
    assert "does not load here" in capfd.readouterr().err
    for name, lib in ((build_script.CPU, library.CPU), (build_script.CUDA, library.CUDA)):
        if lib.path:
            assert build_script.why_unusable(name, lib.path) is None
            assert "refuses:" in capfd.readouterr().err


def test_a_library_that_refuses_nothing_is_left_out(
    build_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library.CPU.path:
        pytest.skip(str(library.CPU.reason))
    monkeypatch.setitem(build_script.REFUSALS, build_script.CPU, "pass")
    reason = build_script.why_unusable(build_script.CPU, library.CPU.path)
    assert reason == "an op took arguments that it must refuse"


# ---- other compilers -----------------------------------------------------------------------------
CLANG = ["clang++", *(f"clang++-{version}" for version in range(25, 13, -1))]
OTHER_COMPILERS = {"clang": CLANG, "g++-aarch64-linux-gnu": ["aarch64-linux-gnu-g++"]}


@pytest.mark.parametrize("package", OTHER_COMPILERS)
def test_other_compilers_build_the_cpu_code(package: str, tmp_path: Path) -> None:
    """Clang is macOS's compiler; aarch64 is that of Macs and of ARM servers."""
    compiler = next(filter(None, map(shutil.which, OTHER_COMPILERS[package])), None)
    if compiler is None:
        pytest.skip(f"{OTHER_COMPILERS[package][0]} is not installed (Debian's package {package})")
    if not (ROOT / "csrc").exists():
        pytest.skip("no sources next to the tests")
    from torch.utils.cpp_extension import include_paths

    includes = [part for path in include_paths() for part in ("-isystem", path)]
    for source in (ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))):
        run = subprocess.run(
            [compiler, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror",
             "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000", *includes, "-c", source,
             "-o", tmp_path / "out.o"], capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize(("isa", "most"), [("baseline", 15), ("avx2", 15), ("avx512", 16)])
def test_kernels_compare_and_convert_whole_registers(isa: str, most: int, tmp_path: Path) -> None:
    """GCC compares vectors that are wider than a register lane by lane, and converts those of bytes
    one by one, several times as slowly.
    """
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")
    if not (ROOT / "csrc").exists():
        pytest.skip("no sources next to the tests")
    assembly = tmp_path / "kernels.s"
    subprocess.run(
        [compiler, "-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-S",
         ROOT / "csrc" / "cpu" / f"isa_{isa}.cpp", "-o", assembly], check=True,
    )  # fmt: skip
    comparisons, insertions = Counter[str](), Counter[str]()
    functions: list[str] = []
    for line in assembly.read_text().splitlines():
        if line.startswith("_ZN3zsu") and line.endswith(":"):
            functions.append(line)
        elif functions:
            comparisons[functions[-1]] += bool(re.match(r"\tv?u?comis[sd]\t", line))
            insertions[functions[-1]] += bool(re.match(r"\tv?pinsr[bdwq]\t", line))
    assert sum("kernel" in function for function in functions) > 15
    assert max(comparisons.values()) <= most, comparisons  # those of single numbers
    assert max(insertions.values()) < 8, insertions


def test_neon_kernels_compute_what_the_others_do(tmp_path: Path) -> None:
    """The same program for this CPU and, in an emulator, for aarch64: both print their results."""
    cross, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    host = shutil.which(os.environ.get("CXX", "c++"))
    if not cross or not emulator or not host:
        pytest.skip("needs c++, and Debian's packages g++-aarch64-linux-gnu and qemu-user")
    if not (ROOT / "csrc").exists():
        pytest.skip("no sources next to the tests")
    sources = [*sorted((ROOT / "csrc" / "cpu").glob("isa_*.cpp")), ROOT / "csrc/cpu/dispatch.cpp"]
    results = []
    for compiler, run in ((host, []), (cross, [emulator])):
        program = tmp_path / f"kernels-{len(results)}"
        subprocess.run(
            [compiler, "-std=c++20", "-O1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
             "-static", f"-I{ROOT / 'csrc' / 'cpu'}", *sources,
             Path(__file__).parent / "ops" / "print_kernels.cpp", "-o", program], check=True,
        )  # fmt: skip
        printed = subprocess.run([*run, program], capture_output=True, text=True, check=True)
        name, *lines = printed.stdout.splitlines()
        results.append([line.split() for line in lines])
    assert name == "neon"
    assert len(results[0]) == len(results[1]) > 1000
    for (kind, a), (other, b) in zip(*results, strict=True):
        assert kind == other
        digits = {"bfloat16": 1e-2, "float16": 2e-3, "float64": 1e-12}.get(kind, 2e-6)
        assert float(b) == pytest.approx(float(a), rel=digits, abs=1e-7)


def libraries(names: list[str]) -> list[str]:
    return [n for n in names if n.endswith(".so")]


def test_a_pure_python_install_on_request(tmp_path: Path) -> None:
    run, names = wheel(tmp_path, ZSU_FAST_CPP="0")
    assert run.returncode == 0, run.stderr
    assert "zsu_fast/ops/reference.py" in names
    assert "zsu_fast/ops/triton/ascent_step.py" in names
    assert not libraries(names)
    assert "ZSU_FAST_CPP=0: pure Python" in run.stderr


def test_an_install_without_a_compiler(tmp_path: Path) -> None:
    run, names = wheel(
        tmp_path, CXX="/nonexistent/c++", CC="/nonexistent/cc", ZSU_FAST_CUDA="0",
        ZSU_FAST_VERSION_LABEL="cu130",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert f"zsu_fast-{VERSION}+cu130.dist-info/WHEEL" in names  # of the wheel with CUDA
    assert "zsu_fast/ops/reference.py" in names
    assert not libraries(names)
    assert run.stderr.count("zsu_fast build: pure Python") == 1
    assert "zsu_fast._C_cpu left out, its build failed" in run.stderr
    assert "zsu_fast/_C_cpu.left_out.txt" in names


def test_a_build_that_must_succeed_fails(tmp_path: Path) -> None:
    run, names = wheel(tmp_path, CXX="/nonexistent/c++", ZSU_FAST_CPP="1", ZSU_FAST_CUDA="0")
    assert run.returncode != 0
    assert not names


def test_an_install_without_torch_at_build_time(tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    (fake / "torch.py").write_text("raise ImportError('no torch here')\n")
    run, names = wheel(tmp_path, PYTHONPATH=str(fake))
    assert run.returncode == 0, run.stderr
    assert "torch cannot be imported (no torch here)" in run.stderr
    assert not libraries(names)


def test_cuda_on_request_without_a_toolkit_fails(tmp_path: Path) -> None:
    run, _ = wheel(tmp_path, ZSU_FAST_CUDA="yes")
    assert run.returncode != 0
    assert "ZSU_FAST_CUDA must be auto, 0 or 1" in run.stderr + run.stdout

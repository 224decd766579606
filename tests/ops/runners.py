"""The backends that every op is tested on.

On the CPU, Triton needs TRITON_INTERPRET=1 before it is imported: `test_triton_interpreted.py` runs
the same tests in such a process. `test_cuda_emulated.py` runs them on the sources of the CUDA
kernels, compiled for the CPU; ZSU_EMULATED names that library.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from zsu_fast.ops import backends, library
from zsu_fast.ops.schemas import CPU_ONLY, SCHEMAS
from zsu_fast.ops.validation import checked_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("ZSU_EMULATED")
if EMULATED:
    torch.ops.load_library(EMULATED)
    for name in SCHEMAS.keys() - set(CPU_ONLY):  # what `choose` returns for backend "cuda" on a CPU
        emulated = getattr(torch.ops.zsu_emulated, name).default
        backends._chosen[name, "cpu", "cuda"] = emulated


class Runner(NamedTuple):
    """A backend and the device it is tested on."""

    backend: str
    device: str


# of ops without GPU kernels
CPU_RUNNERS = (
    [pytest.param(Runner(name, "cpu"), id=name) for name in ("cpp", "eager")]
    if not EMULATED and not INTERPRETED
    else []
)
needs_library = pytest.mark.skipif(not library.CPU.loaded, reason=str(library.CPU.reason))
NATIVE = [pytest.param(True, marks=needs_library), False]  # for `op_of`


def op_of(name: str, native: bool) -> Any:
    """The native op, or plain torch with the same checks."""
    return getattr(torch.ops.zsu_fast, name).default if native else checked_reference(name)


def assert_refused(name: str, native: bool, args: dict[str, Any], message: str) -> None:
    """Assert that the op raises with ``message``, natively or in plain torch."""
    op = op_of(name, native)
    with pytest.raises(RuntimeError, match=message):
        op(*args.values())


def check_schema_and_fake(name: str, args: dict[str, Any]) -> None:
    """`torch.library.opcheck` of an op without autograd."""
    torch.library.opcheck(
        getattr(torch.ops.zsu_fast, name).default, tuple(args.values()),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def runners(compiled: bool = True) -> list[object]:
    """Returns the runners of this process; ``compiled=False`` where compiling takes too long."""
    gpu = pytest.mark.gpu
    if INTERPRETED:
        return [pytest.param(Runner("triton", "cpu"), id="triton")]
    if EMULATED:
        return [pytest.param(Runner("cuda", "cpu"), id="emulated")]
    found = [
        pytest.param(Runner("cpp", "cpu"), id="cpp"),
        pytest.param(Runner("eager", "cpu"), id="eager"),
        pytest.param(Runner("cuda", "cuda"), id="cuda", marks=gpu),
        pytest.param(Runner("triton", "cuda"), id="triton-gpu", marks=gpu),
        pytest.param(Runner("eager", "cuda"), id="eager-gpu", marks=gpu),
    ]
    if compiled:
        found.append(pytest.param(Runner("compile", "cpu"), id="compile"))
    return found


def run_on_isa(isa: str, code: str) -> None:
    """Runs ``code`` in a process whose CPU kernels are those of ``isa``, beside these tests; skips
    the test if this CPU does not have it.
    """
    order, best = ["baseline", "avx2", "avx512"], library.cpu_isa()
    if best not in order or order.index(isa) > order.index(str(best)):
        pytest.skip(f"this CPU has {best}")
    start = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    start += f"from zsu_fast.ops import library; assert library.cpu_isa() == {isa!r}\n"
    environment = {**os.environ, "ZSU_FAST_CPU_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()


def same(runner: Runner, got: Tensor, want: Tensor) -> None:
    """Assert equal bits; on a GPU equal up to rounding, as alignment sets the order of sums."""
    if "cuda" in runner:
        rtol = {torch.float64: 1e-13, torch.float32: 2e-6}.get(got.dtype, 1e-2)
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-7)
    else:
        assert torch.equal(got, want)

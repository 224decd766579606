"""Backends to test every op on. Triton runs on the CPU only under TRITON_INTERPRET=1, which must be
set before import: `test_triton_interpreted.py` runs the same tests in such a process.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Runner(NamedTuple):
    """A backend and the device it is tested on."""

    backend: str
    device: str


def runners(compiled: bool = True) -> list[object]:
    """All that can be tested in this process; ``compiled=False`` where compiling costs too long."""
    gpu = pytest.mark.gpu
    if INTERPRETED:
        return [pytest.param(Runner("triton", "cpu"), id="triton")]
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


def same(runner: Runner, got: Tensor, want: Tensor) -> None:
    """Equal bits; on a GPU up to rounding, since how rows are aligned sets the order of sums."""
    if runner.device == "cuda":
        rtol = {torch.float64: 1e-13, torch.float32: 2e-6}.get(got.dtype, 1e-2)
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-7)
    else:
        assert torch.equal(got, want)

"""The Triton kernels on the CPU: runs the op tests again in a process with Triton's interpreter.

The interpreter runs programs one after another, so it cannot show races: the `gpu` tests do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this is the interpreted process")
    if torch.cuda.is_available():
        pytest.skip("the gpu tests run the compiled kernels")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider",
         *(str(HERE / f"test_{op}.py") for op in
           ("signed_cross_entropy", "masked_cross_entropy", "ascent_step", "bad_input",
            "gradients"))],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = int(run.stdout.rsplit(" passed", 1)[0].rsplit(maxsplit=1)[-1])
    assert passed >= 160, run.stdout[-500:]

"""What importing the package loads: heavy libraries only when they are used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "PIL", "filelock", "jinja2", "onnx", "onnxruntime", "pandas", "rich", "scipy", "sympy", "timm",
    "torch._dynamo", "torch._inductor", "torch.fx.experimental.symbolic_shapes", "torch.onnx",
    "torchvision", "transformers", "triton", "typer",
)  # fmt: skip
OF_THE_COMMAND = ("rich", "typer")  # what prints its help


def loaded_beyond_torch(statement: str) -> set[str]:
    """Those of `HEAVY` that ``statement`` loads in a new process and ``import torch`` does not."""
    code = f"""
import json, sys, torch
before = set(sys.modules)
{statement}
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1])) & set(HEAVY)


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import zsu_fast", ()),
        ("from zsu_fast import check, unlearn", ()),
        ("import zsu_fast.cli.app", OF_THE_COMMAND),
        (
            "from typer.testing import CliRunner; import zsu_fast.cli.app as cli; "
            "CliRunner().invoke(cli.app, ['--help'])",
            OF_THE_COMMAND,
        ),
    ],
)
def test_heavy_libraries_are_imported_when_used(statement: str, allowed: tuple[str, ...]) -> None:
    assert loaded_beyond_torch(statement) <= set(allowed)

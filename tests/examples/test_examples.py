"""Every example runs in a process of its own and prints what its docstring says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FIGURES = """
import runpy, sys
import matplotlib.pyplot as plt
runpy.run_path(sys.argv[1], run_name="__main__")
figures = [plt.figure(number) for number in plt.get_fignums()]
print("figures:", [sum(axis.has_data() for axis in figure.axes) for figure in figures])
"""


def python(*arguments: str | Path, folder: Path) -> str:
    """What ``python *arguments`` prints; it is run in ``folder``, with one thread."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def accuracies(printed: str) -> dict[str, tuple[float, float]]:
    """(FA, RA) of every line that states them, by what stands before."""
    found = re.findall(r"^(?:(.*): )?FA ([\d.]+) %.*?RA ([\d.]+) %", printed, re.MULTILINE)
    return {name: (float(fa), float(ra)) for name, fa, ra in found}


def close(*values: float) -> tuple[object, ...]:
    """FA and RA within half a per cent."""
    return tuple(pytest.approx(value, abs=0.5) for value in values)


LENET = {"original": close(99.88, 98.67), "unlearned": close(0, 99.58)}


def test_quickstart(tmp_path: Path) -> None:
    printed = accuracies(python(EXAMPLES / "quickstart.py", folder=tmp_path))
    assert printed == LENET | {"mask": close(0, 99.58)}


def test_deep_forgetting_survives_the_original_last_layer(tmp_path: Path) -> None:
    printed = accuracies(python(EXAMPLES / "deep.py", folder=tmp_path))
    assert printed["output"] == close(0, 99.58)
    assert printed["output, original last layer back"] == close(99.88, 98.67)
    for name in ("deep", "deep, original last layer back"):
        fa, ra = printed[name]
        assert fa <= 3
        assert ra >= 97.5
    assert len(printed) == 4


def test_requests(tmp_path: Path) -> None:
    printed = python(EXAMPLES / "requests.py", folder=tmp_path)
    assert accuracies(printed) == {"after R-1": close(0, 99.33), "after R-2": close(0, 99.44)}
    assert "ledger: R-1 forgot [5], R-2 forgot [2] (forgotten before: [5])" in printed
    delta = re.search(r"delta: ([\d,]+) bytes, rebuilt bit for bit: True", printed)
    assert delta is not None
    # the last layer in float32, 84 x 10 weights and 10 biases, and a header
    assert 3400 <= int(delta[1].replace(",", "")) <= 4500
    assert not list(tmp_path.iterdir())


def test_own_model(tmp_path: Path) -> None:
    printed = python(EXAMPLES / "own_model.py", folder=tmp_path)
    assert accuracies(printed) == {"original": close(100, 100), "unlearned": close(0, 100)}
    trained = "layer2.weight, layer2.bias, classifier.weight, classifier.bias"
    assert f"trained: {trained}\n" in printed


@pytest.mark.parametrize(
    ("launcher", "shares"),
    [
        ([], [320]),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], [160, 160]),
    ],
    ids=["alone", "two ranks"],
)
def test_torchrun(launcher: list[str], shares: list[int], tmp_path: Path) -> None:
    printed = python(*launcher, EXAMPLES / "torchrun.py", folder=tmp_path)
    assert printed.count(f"impressions per rank: {shares}\n") == 1
    assert accuracies(printed) == {"": LENET["unlearned"]}


def test_plain_torch(tmp_path: Path) -> None:
    printed = accuracies(python(EXAMPLES / "unlearn_in_plain_torch.py", folder=tmp_path))
    assert printed == LENET


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
def test_plot_impressions(tmp_path: Path) -> None:
    page = EXAMPLES / "plot_impressions.py"
    printed = python("-c", FIGURES, page, folder=tmp_path)
    assert accuracies(printed) == LENET | {"mask": close(0, 99.58)}
    share = re.search(r"320 impressions, (\d+) % answered with their class", printed)
    assert share is not None
    assert int(share[1]) >= 98
    assert "largest change of a feature: 0.0\n" in printed
    assert "figures: [40, 1, 12, 1]\n" in printed  # axes with data, figure by figure


def test_every_example_has_a_test() -> None:
    tests = Path(__file__).read_text()
    scripts = [path.name for path in EXAMPLES.glob("*.py")]
    assert scripts
    assert [name for name in scripts if f'"{name}"' not in tests] == []

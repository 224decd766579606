"""``zsu-fast check``, from files to an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import call

from zsu_fast.models import checkpoint, zoo

CHECK = ("check", "lenet5", "--forget", "1,2", "--unlearned")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the untouched LeNet5, and one whose outputs are masked."""
    folder = tmp_path_factory.mktemp("check")
    model = zoo.load("lenet5")
    checkpoint.save_weights(folder / "untouched.safetensors", model)
    model.fc3.bias.data[[1, 2]] = -1e9
    checkpoint.save_weights(folder / "masked.safetensors", model)
    checkpoint.save_weights(folder / "other.safetensors", zoo.load("karpathynet"))
    return folder


def test_the_exit_code_is_the_verdict(files: Path) -> None:
    untouched, masked = str(files / "untouched.safetensors"), str(files / "masked.safetensors")
    assert call(*CHECK, untouched, code=1).startswith("FAILED: Not forgotten: 100%")
    assert "PASSED: Forgotten in the outputs only: classes 1 (one)" in call(*CHECK, masked)
    assert "(deep was asked for)" in call(*CHECK, masked, "--depth", "deep", code=1)


def test_classes_may_be_named(files: Path, tmp_path: Path) -> None:
    masked, names = str(files / "masked.safetensors"), tmp_path / "names.txt"
    assert "1 (one), 2 (two)" in call(*CHECK[:3], "one,2", "--unlearned", masked)
    names.write_text("\n".join("abcdefghij"))
    given = call(*CHECK[:3], "b,c", "--class-names", str(names), "--unlearned", masked)
    assert "1 (b), 2 (c)" in given


def test_json(files: Path) -> None:
    facts = json.loads(call(*CHECK, str(files / "masked.safetensors"), "--json"))
    assert (facts["level"], facts["passed"], facts["forgotten"]) == ("output", True, [1, 2])
    assert facts["leak"] == 0
    assert facts["unmask_leak"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["other.safetensors"], "does not fit"), (["none.pt"], "none.pt"),
     (["masked.safetensors", "--depth", "full"], "depth: got 'full'")],
    ids=["other", "missing", "depth"],
)  # fmt: skip
def test_what_cannot_be_checked_is_an_error(files: Path, arguments: list[str], words: str) -> None:
    name, *more = arguments
    assert words in json.loads(call(*CHECK, str(files / name), *more, "--json", code=2))["error"]

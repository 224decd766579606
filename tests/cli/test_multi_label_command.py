"""The commands on multi-label models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command import QUICK, call

from zsu_fast.models import zoo


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """Two overlaid digits each, and whether each digit is one of them."""
    file = np.load(zoo.ASSETS / "mnist_test_2000.npz")
    images, labels = torch.from_numpy(file["images"][:300]), torch.from_numpy(file["labels"][:300])
    both = torch.maximum(images, images.flip(0))
    hot = torch.nn.functional.one_hot(labels.long(), 10)
    path = tmp_path / "pairs.npz"
    np.savez(path, images=both.numpy(), labels=(hot + hot.flip(0)).clamp(max=1).numpy())
    return str(path)


def test_evaluate_reads_labels_of_several_classes(pairs: str) -> None:
    found = json.loads(call("evaluate", "lenet5", "--forget", "1,2", "--data", pairs, "--json"))
    assert found["multi_label"] is True
    assert found["images"] == 300
    assert found["forget_rate"] is not None
    text = call("evaluate", "lenet5", "--forget", "1,2", "--data", pairs, "--multi-label")
    assert "average precision" in text
    assert "1, forgotten" in text


def test_unlearn_and_audit_take_the_option(pairs: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out.safetensors")
    made = json.loads(
        call("unlearn", "lenet5", "--forget", "1", "--multi-label", "--out", out, *QUICK, "--json")
    )
    assert made["record"]["multi_label"] is True
    found = json.loads(
        call("audit", "lenet5", "--unlearned", out, "--forget", "1", "--multi-label", "--data",
             pairs, "--json")
    )  # fmt: skip
    assert found["settings"]["multi_label"] is True
    rows = {row["name"]: row["values"] for row in found["rows"]}
    assert rows["unlearned"]["fa"] < rows["original"]["fa"]


def test_single_label_refuses_labels_of_several_classes(pairs: str) -> None:
    text = call("evaluate", "lenet5", "--forget", "1", "--data", pairs, "--single-label", code=2)
    assert "multi_label=True" in text

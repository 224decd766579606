"""``zsu-fast audit``, from files to a verdict and a page."""

from __future__ import annotations

import json
from pathlib import Path

from command import call

from zsu_fast.models import checkpoint, zoo


def test_audit_of_a_mask_from_files(tmp_path: Path) -> None:
    fake = zoo.load("lenet5")
    fake.fc3.bias.data[[1, 2]] = -1e9
    weights, golden = tmp_path / "fake.safetensors", tmp_path / "golden.safetensors"
    checkpoint.save_weights(weights, fake)
    checkpoint.save_weights(golden, zoo.load("lenet5_golden"))
    page = tmp_path / "r.html"
    command = ["audit", "lenet5", "--unlearned", str(weights), "--forget", "1,2", "--data", "demo",
               "--golden", str(golden), "--relearn-steps", "0", "--report", str(page)]  # fmt: skip
    assert call(*command).startswith("Only the output was hidden")
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "r.json").read_text())["audit"]["forget"] == [1, 2]
    assert "exists" in call(*command, code=2)
    few = [*command, "--relearn-steps", "1", "--shots", "7", "--force", "--json"]
    result = json.loads(call(*few))
    assert result["findings"][0]["name"] == "mask"
    assert [r["name"] for r in result["rows"]][-1] == "golden"
    assert result["settings"]["shots_used"] == 7
    refused = call("audit", "lenet5", "--unlearned", "none.pt", "--forget", "1", code=2)
    assert "none.pt" in refused


def test_options_that_need_data_are_refused_without_it(tmp_path: Path) -> None:
    weights = tmp_path / "same.safetensors"
    checkpoint.save_weights(weights, zoo.load("lenet5"))
    command = ["audit", "lenet5", "--unlearned", str(weights), "--forget", "1"]
    for option, value in (("--shots", "7"), ("--relearn-steps", "5"), ("--train-data", "demo")):
        assert "without --data" in call(*command, option, value, code=2)

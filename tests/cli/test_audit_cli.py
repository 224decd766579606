"""``zsu-fast audit``, and ``unlearn --report``."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner
from zsu_fast.cli.app import app

import zsu_fast
from zsu_fast.models import checkpoint, zoo


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if "--json" in arguments else result.output  # warnings go to stderr


def test_audit_of_a_mask_from_files(tmp_path: Path) -> None:
    fake = zoo.load("lenet5")
    fake.fc3.bias.data[[1, 2]] = -1e9
    weights, golden = tmp_path / "fake.safetensors", tmp_path / "golden.safetensors"
    checkpoint.save_weights(weights, fake)
    checkpoint.save_weights(golden, zoo.load("lenet5_golden"))
    page = tmp_path / "r.html"
    command = ["audit", "lenet5", "--unlearned", str(weights), "--forget", "1,2", "--data", "demo",
               "--golden", str(golden), "--relearn-steps", "0", "--report", str(page)]  # fmt: skip
    told = call(*command)
    assert told.startswith("Only the output was hidden")
    assert page.read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "r.json").read_text())["audit"]["forget"] == [1, 2]
    assert "exists" in call(*command, code=2)
    told = json.loads(call(*command, "--force", "--json"))
    assert told["findings"][0]["name"] == "mask"
    assert [r["name"] for r in told["rows"]][-1] == "golden"
    few = [*command, "--relearn-steps", "1", "--shots", "7", "--force", "--json"]
    assert json.loads(call(*few))["settings"]["shots_used"] == 7
    refused = call("audit", "lenet5", "--unlearned", "none.pt", "--forget", "1", code=2)
    assert "none.pt" in refused


def test_unlearn_writes_a_report_of_its_run(tmp_path: Path) -> None:
    out, page = tmp_path / "o.safetensors", tmp_path / "report.html"
    told = json.loads(
        call("unlearn", "lenet5", "--forget", "3", "--out", str(out), "--report", str(page),
             "--impressions-per-class", "8", "--tail", "last", "--json")
    )  # fmt: skip
    assert told["verdict"][0].startswith("Output-level forgetting")
    html = page.read_text()
    assert told["record"]["weights_after"] in html
    assert "optimiser steps" in html
    assert told["record"]["weights_before"] == zsu_fast.models.parameters.weights_hash(
        zoo.load("lenet5")
    )
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["audit"]["hashes"]["original"] == told["record"]["weights_before"]
    assert facts["audit"]["hashes"]["unlearned"] == told["record"]["weights_after"]
    assert facts["record"]["forget"] == [3]

"""``--output`` says which item of a model's output holds the logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import QUICK, call

MODEL = """
import torch
from zsu_fast.models import zoo

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.other = zoo.load("lenet5"), torch.nn.Linear(784, 10)

    def forward(self, x):
        return {"digits": self.net(x), "other": self.other(x.flatten(1))}

def make():
    return Two().eval()
"""


def test_output_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two_heads.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    out, shape = str(tmp_path / "out.safetensors"), ["--input-shape", "1,28,28"]
    forget = ["two_heads:make", "--forget", "1,2"]
    refused = call("evaluate", *forget, "--data", "demo", *shape, code=2)
    assert "several tensors" in refused
    shape += ["--output", "digits"]
    text = call("unlearn", *forget, "--out", out, "--json", *shape, *QUICK)
    assert json.loads(text)["record"]["split"]["trained"] == ["net.fc3.weight", "net.fc3.bias"]
    before = json.loads(call("evaluate", *forget, "--data", "demo", "--json", *shape))
    after = call("evaluate", *forget, "--weights", out, "--data", "demo", "--json", *shape)
    assert before["forget_accuracy"] > 95
    assert json.loads(after)["forget_accuracy"] < 2
    found = json.loads(call("plan", *forget, "--json", *shape))
    assert found["tail"].startswith("net.")

"""``zsu-fast demo``, ``evaluate`` and ``doctor``, as a person sees them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call

import zsu_fast
from zsu_fast.cli import demo
from zsu_fast.cli.demo import FILES, mnist_test
from zsu_fast.models import checkpoint, zoo


@dataclass(frozen=True)
class DemoRun:
    """The demo's folder, the JSON it printed, and what `demo.run` returned."""

    folder: Path
    printed: dict[str, Any]
    result: Any


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """The demo, run by ``--force`` into a folder in which one of its files exists."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / FILES[1]).write_text("mine")
    results: list[Any] = []

    def recording(*arguments: Any, **options: Any) -> Any:
        results.append(demo.run(*arguments, **options))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsu_fast.cli.app.run_demo", recording)
        printed = json.loads(call("demo", "--out", str(folder), "--force", "--json"))
    return DemoRun(folder, printed, results[0])


def test_demo_forgets_and_writes_model_record_and_report(demo_run: DemoRun) -> None:
    rows = {row["name"]: row for row in demo_run.printed["rows"]}
    assert list(rows) == ["original", "mask", "unlearned"]
    assert rows["original"]["forget_accuracy"] > 98
    assert rows["mask"]["forget_accuracy"] == 0
    assert rows["unlearned"]["forget_accuracy"] <= 0.2
    assert rows["unlearned"]["retain_accuracy"] >= rows["mask"]["retain_accuracy"] - 1
    assert rows["unlearned"]["seconds"] > 0
    assert sorted(p.name for p in demo_run.folder.iterdir()) == sorted(FILES)
    saved = zoo.build("lenet5")
    checkpoint.load_into(saved, demo_run.folder / FILES[0])
    score = zsu_fast.evaluate(saved, mnist_test(), [1, 2, 3, 4])
    assert score.forget_accuracy == rows["unlearned"]["forget_accuracy"]
    assert json.loads((demo_run.folder / FILES[1]).read_text()) == demo_run.printed["record"]


def test_demo_prints_a_table(
    demo_run: DemoRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsu_fast.cli.app.run_demo", lambda *_, **__: demo_run.result)
    text = call("demo", "--out", str(tmp_path))
    assert "unlearned" in text
    assert demo_run.printed["record"]["depth"]["level"] == "deep"
    assert demo_run.printed["verdict"][0] in " ".join(text.split())
    assert "report: " in text


def test_demo_does_not_overwrite_without_force(tmp_path: Path) -> None:
    (tmp_path / FILES[1]).write_text("mine")
    assert "exists" in call("demo", "--out", str(tmp_path), code=2)
    assert (tmp_path / FILES[1]).read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [FILES[1]]


def test_evaluate_reads_npz_folders_and_the_demo_images(tmp_path: Path) -> None:
    demo = json.loads(call("evaluate", "lenet5", "--forget", "1", "--data", "demo", "--json"))
    assert demo["forget_count"] == 200
    assert demo["retain_count"] == 1800
    with np.load(zoo.ASSETS / "mnist_test_2000.npz") as file:
        images, labels = file["images"][::50], file["labels"][::50]
    np.savez(tmp_path / "some.npz", images=images, labels=labels)
    few = json.loads(
        call("evaluate", "lenet5", "--forget", "1", "--data", str(tmp_path / "some.npz"), "--json")
    )
    assert few["forget_count"] + few["retain_count"] == 40
    assert "FA" in call("evaluate", "lenet5", "--forget", "1", "--data", "demo")
    np.savez(tmp_path / "wrong.npz", images=images)
    for data in ("nowhere", str(tmp_path / "wrong.npz")):
        result = call("evaluate", "lenet5", "--forget", "1", "--data", data, "--json", code=2)
        assert "data" in json.loads(result)["error"]


def test_doctor_names_versions_devices_and_extras() -> None:
    result = json.loads(call("doctor", "--json"))
    assert result["torch"] == torch.__version__
    assert result["devices"]["cpu"]["chosen"] in result["devices"]["cpu"]["backends"]
    assert set(result["extras"]) == {"torchvision", "timm", "transformers", "PIL"}
    assert "torch" in call("doctor")


def test_doctor_reads_a_cache(tmp_path: Path) -> None:
    assert "no choice is stored" in call("doctor", "--cache", str(tmp_path))
    assert "which is no folder" in call("doctor", "--cache", str(tmp_path / "absent"), code=2)


def test_a_ledger_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """It was an empty table, and exit code 0."""
    path = tmp_path / "requests"
    assert "is not a file" in call("ledger", "show", str(path), code=2)
    assert json.loads(call("ledger", "show", str(path), "--json", code=2))["type"] == "LedgerError"
    call("ledger", "verify", str(path), code=2)
    for option in ("--weights", "--classes"):
        text = call("ledger", "verify", str(path), option, "5", code=2)
        assert "without --model" in text

"""``zsu-fast unlearn``, from the outside: what a person types, sees, and finds on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import QUICK, call
from safetensors import safe_open

import zsu_fast
from zsu_fast.cli.demo import mnist_test
from zsu_fast.models import checkpoint, zoo
from zsu_fast.models.parameters import weights_hash


def test_unlearn_writes_weights_that_load_and_a_record(tmp_path: Path) -> None:
    out, record = tmp_path / "out.safetensors", tmp_path / "record.json"
    text = call("unlearn", "lenet5", "--forget", "1-3,9", "--out", str(out),
                "--record", str(record), *QUICK)  # fmt: skip
    assert "Forgot 4 of 10 classes" in text
    assert "Level: output. Trained: fc3.weight, fc3.bias." in text
    facts = json.loads(record.read_text())
    assert facts["forget"] == [1, 2, 3, 9]
    assert facts["weights_before"] == weights_hash(zoo.load("lenet5"))
    model = zoo.build("lenet5")
    checkpoint.load_into(model, out)
    assert facts["weights_after"] == weights_hash(model)
    with safe_open(str(out), "pt") as file:
        assert json.loads(file.metadata()["zsu_fast.forget"]) == [1, 2, 3, 9]
    score = zsu_fast.evaluate(model, mnist_test(), [1, 2, 3, 9])
    assert score.forget_accuracy is not None
    assert score.forget_accuracy < 2


def test_unlearn_takes_a_factory_weights_a_file_of_classes_and_pth(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(
        "from zsu_fast.models.zoo import KarpathyNet\ndef make():\n    return KarpathyNet()\n"
    )
    weights, out = tmp_path / "in.pt", tmp_path / "out.pth"
    torch.save({"state_dict": zoo.load("karpathynet").state_dict()}, weights)
    (tmp_path / "classes.txt").write_text("3\n4, 8\n")
    script = Path(sys.executable).parent / "zsu-fast"
    done = subprocess.run(
        [str(script), "unlearn", "my_model:make", "--weights", str(weights),
         "--forget", "classes.txt", "--out", str(out), "--input-shape", "3x32x32", "--mean",
         "0.4914,0.4822,0.4465", "--std", "0.247,0.2435,0.2616", "--json", *QUICK],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["record"]["forget"] == [3, 4, 8]
    assert result["record"]["input"]["source"] == "shape given; mean and std given"
    changed = torch.load(out, weights_only=True)
    before = zoo.load("karpathynet").state_dict()
    same = {name for name in before if torch.equal(before[name], changed[name])}
    assert same == set(before) - {"fc1.weight", "fc1.bias"}


def test_quiet_where_output_is_no_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zsu_fast", "unlearn", "lenet5", "--forget", "1", "--json"]
    output_level = [*QUICK, "--tail", "fc2", "--depth", "output"]
    output_level += ["--impressions-per-class", "16"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o.safetensors"), *output_level],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    json.loads(done.stdout)
    assert done.stderr == ""


@pytest.mark.usefixtures("few_rows")
def test_unlearn_is_deep_by_default(tmp_path: Path) -> None:
    out, record = tmp_path / "out.safetensors", tmp_path / "record.json"
    text = call("unlearn", "lenet5", "--forget", "1-3,9", "--out", str(out),
                "--record", str(record))  # fmt: skip
    trained = [f"{layer}.{name}" for layer in ("fc1", "fc2", "fc3") for name in ("weight", "bias")]
    assert f"Level: deep. Trained: {', '.join(trained)}." in text
    assert "still inside" not in text
    facts = json.loads(record.read_text())
    assert (facts["depth"]["depth"], facts["depth"]["level"]) == ("deep", "deep")
    assert facts["depth"]["unmask_leak"]["after"] <= 0.02
    model, before = zoo.build("lenet5"), zoo.load("lenet5").state_dict()
    checkpoint.load_into(model, out)
    assert facts["weights_after"] == weights_hash(model)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == set(trained)
    score = zsu_fast.evaluate(model, mnist_test(), [1, 2, 3, 9])
    assert score.forget_accuracy is not None
    assert score.retain_accuracy is not None
    assert score.forget_accuracy < 2
    assert score.retain_accuracy > 95


def test_the_published_recipe_is_output_level() -> None:
    from zsu_fast.cli.unlearn import MethodOptions

    assert MethodOptions().arguments()["depth"] is None
    assert MethodOptions(depth="output").arguments()["depth"] == "output"
    assert MethodOptions(paper=True).arguments()["depth"] == "output"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["unlearn", "lenet5", "--forget", "10"], ["forget", "10", "0 to 9"]),
        (["unlearn", "lenet5", "--forget", "a"], ["forget", "'a'", "1,2,3"]),
        (["unlearn", "lenet5", "--forget", "5-3"], ["forget", "5-3"]),
        (["unlearn", "lenet5", "--forget", "0-9"], ["forget", "every class"]),
        (["unlearn", "nonet", "--forget", "1"], ["model", "nonet", "lenet5"]),
        (["unlearn", "no.such:thing", "--forget", "1"], ["model", "no.such:thing"]),
        (["unlearn", "os:getcwd", "--forget", "1"], ["model", "str", "nn.Module"]),
        (["unlearn", "resnet20_cifar", "--forget", "1"], ["resnet20_cifar", "weights file"]),
        (["unlearn", "torchvision:resnet18", "--forget", "1"], ["weights", "random"]),
        (["unlearn", "lenet5", "--forget", "1", "--weights", "none.pt"], ["none.pt", "not a file"]),
        (["unlearn", "lenet5", "--forget", "1", "--tail", "fc9"], ["tail", "fc9", "fc3"]),
        (["unlearn", "lenet5", "--forget", "1", "--objective", "x"], ["objective", "masked"]),
        (["unlearn", "lenet5", "--forget", "1", "--input-shape", "3,a"], ["input_shape", "3,a"]),
        (["unlearn", "lenet5", "--forget", "1", "--device", "cuda:77"], ["device", "cuda:77"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    out = tmp_path / "out.safetensors"
    result = json.loads(call(*arguments, "--out", str(out), "--json", code=2))
    for word in words:
        assert word in result["error"]
    assert list(tmp_path.iterdir()) == []


def run_must_not_start(*_: object, **__: object) -> None:
    raise AssertionError("the run began")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--report", "r.html", "--report-data", "nowhere"], ["data", "nowhere"]),
        (["--report-data", "demo"], ["report_data", "without --report"]),
        (["--request", "r1"], ["request", "without --ledger"]),
        (["--other-base"], ["other_base", "without --ledger"]),
        (["--classes", "10"], ["classes", "10", "lenet5"]),
        (["--record", "o.pt"], ["out", "named twice"]),
        (["--report", "r.html", "--record", "r.json"], ["out", "r.json", "named twice"]),
        (["--paper", "--tail", "fc1"], ["paper", "--tail fc1"]),
        (["--paper", "--depth", "deep"], ["paper", "--depth deep"]),
        (["--impressions", "none.safetensors"], ["none.safetensors"]),
        (["--space", "outer"], ["space", "outer", "tail-input"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--margin", "-1"], ["margin", "-1"]),
        (["--cache", "o.pt/x", "--forgotten", "1"], ["forget", "forgotten"]),
        (["--tail", "fc9", "--space", "input"], ["tail", "fc9"]),
        (["--tail", "9", "--space", "input", "--depth", "output"], ["tail", "9", "1 to 5"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_can_be_checked_is_checked_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]
) -> None:
    """A typo in --report-data used to be found after the run, with the weights written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zsu_fast.ZeroShotUnlearner.run", run_must_not_start)
    command = ["unlearn", "lenet5", "--forget", "1", "--out", "o.pt", "--json"]
    result = json.loads(call(*command, *arguments, code=2))
    for word in words:
        assert word in result["error"]
    assert list(tmp_path.iterdir()) == []


def test_images_that_the_model_cannot_take_are_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zsu_fast.ZeroShotUnlearner.run", run_must_not_start)
    text = call("unlearn", "karpathynet", "--forget", "1", "--out", str(tmp_path / "o.pt"),
                "--report", str(tmp_path / "r.html"), "--report-data", "demo", code=2)  # fmt: skip
    assert "report_data: its images are (1, 28, 28), the model takes (3, 32, 32)" in " ".join(
        text.split()
    )
    assert list(tmp_path.iterdir()) == []


def test_everyday_options_reach_the_run(tmp_path: Path) -> None:
    impressions = zsu_fast.synthesize(zoo.load("lenet5"), per_class=8, progress=False)
    impressions.save(tmp_path / "i.safetensors")
    facts = json.loads(
        call("unlearn", "lenet5", "--forget", "1", "--out", str(tmp_path / "o.pt"), "--depth",
             "output", "--space", "input", "--steps", "50", "--margin", "3", "--cache",
             str(tmp_path / "c"), "--impressions", str(tmp_path / "i.safetensors"), "--json")
    )  # fmt: skip
    settings = facts["record"]["settings"]
    assert (settings["steps"], settings["margin"], settings["space"]) == (50, 3.0, "input")
    assert settings["cache"] == str(tmp_path / "c")
    assert facts["record"]["impressions"]["count"] == 80


def test_out_is_never_overwritten_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    arguments = ["unlearn", "lenet5", "--forget", "1", "--out", str(out), *QUICK]
    assert "--force" in call(*arguments, code=2)
    assert out.read_bytes() == b"precious"
    call(*arguments, "--force")
    checkpoint.load_into(zoo.build("lenet5"), out)


def test_unlearn_writes_a_report_of_its_run(tmp_path: Path) -> None:
    """The run changes the loaded model in place; delta and report compare with it as it was."""
    out, page = tmp_path / "o.safetensors", tmp_path / "report.html"
    delta, ledger = tmp_path / "delta", tmp_path / "ledger"
    result = json.loads(
        call("unlearn", "lenet5", "--forget", "3", "--out", str(out), "--report", str(page),
             "--delta", str(delta), "--ledger", str(ledger), "--json", *QUICK)
    )  # fmt: skip
    assert result["audit"][0].startswith("Output-level forgetting")
    assert (result["verdict"]["level"], result["verdict"]["passed"]) == ("output", True)
    html = page.read_text()
    assert result["record"]["weights_after"] in html
    assert "optimiser steps" in html
    assert result["record"]["weights_before"] == weights_hash(zoo.load("lenet5"))
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["audit"]["hashes"]["original"] == result["record"]["weights_before"]
    assert facts["audit"]["hashes"]["unlearned"] == result["record"]["weights_after"]
    assert facts["record"]["forget"] == [3]
    unlearned = zsu_fast.apply_delta(zoo.load("lenet5"), delta)
    assert weights_hash(unlearned) == result["record"]["weights_after"]
    assert result["ledger"]["head"] == zsu_fast.Ledger(ledger).head


def test_no_entry_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are written before the entry that vouches for them, and all or none of them."""

    def fail(*_: object) -> None:
        raise zsu_fast.OutputError("delta: no space")

    monkeypatch.setattr("zsu_fast.cli.files.save_delta", fail)
    output = call(
        "unlearn", "lenet5", "--forget", "1", "--ledger", str(tmp_path / "ledger"), "--out",
        str(tmp_path / "o.pt"), "--delta", str(tmp_path / "d"), *QUICK, code=2,
    )  # fmt: skip
    assert "no space" in output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "name"), [("--out", "a.weights"), ("--out", "a"), ("--delta", "a.pt")]
)
def test_unlearn_refuses_an_ending_before_the_work(
    tmp_path: Path, option: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object) -> None:
        raise AssertionError("the model was built")

    monkeypatch.setattr("zsu_fast.cli.options.load_model", no_work)
    text = call("unlearn", "lenet5", "--forget", "1", option, str(tmp_path / name), code=2)
    assert "ending" in text
    if option == "--out":
        text = call("apply", "lenet5", "d.safetensors", option, str(tmp_path / name), code=2)
        assert "ending" in text
    assert list(tmp_path.iterdir()) == []


def test_half_precision_averaged_weights_end_to_end(tmp_path: Path) -> None:
    """What was read is in the record; the file stays float16; equal runs give equal bytes."""
    good, other = zoo.load("lenet5").half().state_dict(), zoo.build("lenet5").half().state_dict()
    weights = tmp_path / "last.pth.tar"
    torch.save({"state_dict": other, "state_dict_ema": good, "epoch": 3}, weights)
    arguments = ("unlearn", "lenet5", "--weights", f"{weights}::state_dict_ema", "--forget", "1",
                 "--depth", "output", *QUICK)  # fmt: skip
    text = call(*arguments, "--out", str(tmp_path / "a.ckpt"), "--json")
    facts = json.loads(text)["record"]["weights_file"]
    assert (facts["file"], facts["entry"]) == (str(weights), "state_dict_ema")
    changed = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {t.dtype for t in changed.values()} == {torch.float16}
    assert torch.equal(changed["conv1.weight"], good["conv1.weight"])
    for name in ("b", "c"):
        call(*arguments, "--out", str(tmp_path / f"{name}.safetensors"))
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    arguments = ("evaluate", "lenet5", "--weights", str(weights), "--forget", "1", "--data", "demo")
    assert "several weights" in " ".join(call(*arguments).split())

"""The command line, from the outside: what a person types, sees, and finds on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner
from zsu_fast.cli.app import app, parse_classes, read_images
from zsu_fast.cli.demo import FILES, mnist_test

import zsu_fast
from zsu_fast.models import checkpoint, zoo

QUICK = ["--impressions-per-class", "8", "--tail", "last"]


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.stdout if "--json" in arguments else result.output  # warnings go to stderr


def test_demo_forgets_and_writes_model_record_and_report(tmp_path: Path) -> None:
    told = json.loads(call("demo", "--out", str(tmp_path / "d"), "--json"))
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == ["original", "mask", "unlearned"]
    assert rows["original"]["forget_accuracy"] > 98
    assert rows["mask"]["forget_accuracy"] == 0
    assert rows["unlearned"]["forget_accuracy"] <= 0.2
    assert rows["unlearned"]["retain_accuracy"] >= rows["mask"]["retain_accuracy"] - 0.3
    assert rows["unlearned"]["seconds"] > 0
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == sorted(FILES)
    saved = zoo.build("lenet5")
    checkpoint.load_into(saved, tmp_path / "d" / FILES[0])
    score = zsu_fast.evaluate(saved, mnist_test(), [1, 2, 3, 4])
    assert score.forget_accuracy == rows["unlearned"]["forget_accuracy"]


def test_demo_does_not_overwrite_without_force(tmp_path: Path) -> None:
    (tmp_path / FILES[1]).write_text("mine")
    assert "exists" in call("demo", "--out", str(tmp_path), code=2)
    assert (tmp_path / FILES[1]).read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [FILES[1]]
    assert "unlearned" in call("demo", "--out", str(tmp_path), "--force")


def test_unlearn_writes_weights_that_load_and_a_record(tmp_path: Path) -> None:
    out, record = tmp_path / "out.safetensors", tmp_path / "record.json"
    text = call("unlearn", "lenet5", "--forget", "1-3,9", "--out", str(out),
                "--record", str(record), *QUICK)  # fmt: skip
    assert "Forgot 4 of 10 classes" in text
    assert "Output-level" in text
    facts = json.loads(record.read_text())
    assert facts["forget"] == [1, 2, 3, 9]
    assert facts["weights_before"] == zsu_fast.models.parameters.weights_hash(zoo.load("lenet5"))
    model = zoo.build("lenet5")
    checkpoint.load_into(model, out)
    assert facts["weights_after"] == zsu_fast.models.parameters.weights_hash(model)
    with safe_open(str(out), "pt") as file:
        assert json.loads(file.metadata()["zsu_fast.forget"]) == [1, 2, 3, 9]
    score = zsu_fast.evaluate(model, mnist_test(), [1, 2, 3, 9])
    assert score.forget_accuracy is not None
    assert score.forget_accuracy < 2


def test_unlearn_takes_a_factory_weights_a_file_of_classes_and_pth(tmp_path: Path) -> None:
    (tmp_path / "my_model.py").write_text(
        "from zsu_fast.zoo import KarpathyNet\ndef make():\n    return KarpathyNet()\n"
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
    told = json.loads(done.stdout)
    assert told["record"]["forget"] == [3, 4, 8]
    assert told["record"]["input"]["source"] == "shape given; mean and std given"
    changed = torch.load(out, weights_only=True)
    before = zoo.load("karpathynet").state_dict()
    same = {name for name in before if torch.equal(before[name], changed[name])}
    assert same == set(before) - {"fc1.weight", "fc1.bias"}


def test_quiet_where_output_is_no_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zsu_fast", "unlearn", "lenet5", "--forget", "1", "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "o.safetensors"), *QUICK, "--tail", "fc2"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    json.loads(done.stdout)
    assert done.stderr == ""


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
    told = json.loads(call(*arguments, "--out", str(out), "--json", code=2))
    for word in words:
        assert word in told["error"]
    assert list(tmp_path.iterdir()) == []


def test_out_is_never_overwritten_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    arguments = ["unlearn", "lenet5", "--forget", "1", "--out", str(out), *QUICK]
    assert "--force" in call(*arguments, code=2)
    assert out.read_bytes() == b"precious"
    call(*arguments, "--force")
    checkpoint.load_into(zoo.build("lenet5"), out)


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
        told = call("evaluate", "lenet5", "--forget", "1", "--data", data, "--json", code=2)
        assert "data" in json.loads(told)["error"]


def test_evaluate_reads_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = np.full((40, 50, 3), 60 * i, dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    loader = read_images(str(tmp_path), zoo.ZOO["karpathynet"].spec)
    images, labels = next(iter(loader))
    assert tuple(images.shape) == (6, 3, 32, 32)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    low = zoo.ZOO["karpathynet"].spec.low.view(3, 1, 1)
    assert torch.allclose(images[0], low.expand(3, 32, 32), atol=1e-4)


def test_classes_from_text() -> None:
    assert parse_classes("1,2, 3") == [1, 2, 3]
    assert parse_classes("0-2,7") == [0, 1, 2, 7]
    assert parse_classes("5") == [5]


def test_doctor_names_versions_devices_and_extras() -> None:
    told = json.loads(call("doctor", "--json"))
    assert told["torch"] == torch.__version__
    assert told["devices"]["cpu"]["chosen"] in told["devices"]["cpu"]["backends"]
    assert set(told["extras"]) == {"torchvision", "timm", "transformers", "matplotlib", "PIL"}
    assert "torch" in call("doctor")

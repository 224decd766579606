"""ImageNet on a user's disk: a folder is read as the model requires, and one command gives the
published rows, here for a stand-in of 8 classes with one real image each.
"""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support import SHARED

from zsu_fast import ArgumentError, InputSpec
from zsu_fast.cli.inputs import image_folder
from zsu_fast.models import checkpoint

CLASSES = [1, 130, 292, 340, 404, 671, 817, 985]  # dissimilar classes


@pytest.fixture
def command() -> ModuleType:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    return importlib.import_module("benchmarks.end_to_end.reproduce_imagenet")


@pytest.mark.shared
def test_the_published_rows_on_a_stand_in(command: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    for label in CLASSES:
        folder = tmp_path / "val" / f"n{label:08d}"
        folder.mkdir(parents=True)
        shutil.copy(SHARED / "imagenet_sample" / f"{label:04d}.jpg", folder)
    weights = checkpoint.load_weights(SHARED / "models" / "tf_efficientnet_lite0.safetensors")
    weights |= {n: weights[n][CLASSES] for n in ("classifier.weight", "classifier.bias")}
    checkpoint.save_tensors(tmp_path / "some.safetensors", weights)
    out = tmp_path / "table.md"
    lines = command.main(
        [
            "--data", str(tmp_path / "val"), "--model", "timm:tf_efficientnet_lite0",
            "--weights", str(tmp_path / "some.safetensors"), "--classes", "8", "--forget", "2,5",
            "--tail", "last", "--out", str(out),
        ]
    )  # fmt: skip
    assert out.read_text() == "\n".join(lines) + "\n"
    assert lines[0] == "# tf_efficientnet_lite0, 2 of 8 classes forgotten"
    assert "2 images of forgotten classes, 6 of others" in lines[2]
    assert "pretrained_cfg" in lines[2]
    rows = {}
    for line in lines[6:]:
        name, *figures = [cell.strip() for cell in line.strip("|").split("|")]
        rows[name] = [float(f) for f in figures]
    assert list(rows) == ["original", "mask", "random embeddings", "zsu_fast"]
    assert rows["original"][:3] == [100, 100, 100]
    assert rows["mask"][:3] == [0, 100, 75]
    assert rows["zsu_fast"][:3] == [0, 100, 75]
    assert rows["zsu_fast"][3] > 0


def picture(path: Path, height: int, width: int) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(path)


def test_a_folder_is_resized_and_cropped_by_the_spec(tmp_path: Path) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = pytest.importorskip("PIL.Image")
    picture(tmp_path / "a" / "1.png", 90, 60)
    for resize, kind in (((48,), "bicubic"), ((40, 40), "bilinear"), (None, "bilinear")):
        spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.25,) * 3, "a test", resize, kind)
        (actual,), _ = next(iter(image_folder(tmp_path, spec)))
        shorter = 37 if resize is None else resize[0]  # 32 * 256 / 224
        size = (shorter, shorter) if resize == (40, 40) else (shorter, int(shorter * 1.5))
        with image.open(tmp_path / "a" / "1.png") as opened:
            method = {"bicubic": image.BICUBIC, "bilinear": image.BILINEAR}[kind]
            small = opened.resize(size, method)
        expected = functional.center_crop(functional.to_tensor(small), [32, 32])
        assert torch.allclose(actual, (expected - 0.5) / 0.25, atol=1e-5), (resize, kind)


def test_grey_images_for_a_grey_model(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    picture(tmp_path / "a" / "1.png", 40, 40)
    spec = InputSpec((1, 28, 28), (0.5,), (0.5,))
    images, _ = next(iter(image_folder(tmp_path, spec)))
    assert tuple(images.shape) == (1, 1, 28, 28)


def test_folders_without_images_keep_their_numbers(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    (tmp_path / "a").mkdir()
    picture(tmp_path / "b" / "1.png", 40, 40)
    spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    _, labels = next(iter(image_folder(tmp_path, spec, classes=2)))
    assert labels.tolist() == [1]


def flat(path: Path) -> None:
    picture(path / "ILSVRC2012_val_00000001.png", 40, 40)


def two(path: Path) -> None:
    picture(path / "a" / "1.png", 40, 40)
    picture(path / "b" / "1.png", 40, 40)


def empty(path: Path) -> None:
    for name in "abc":
        (path / name).mkdir()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (flat, r"0 folders and 1 files.*one sub-folder per class, 3 of them.*side by side"),
        (two, r"2 folders and 0 files.*3 of them"),
        (empty, r"no image"),
    ],
)
def test_a_folder_of_another_layout(tmp_path: Path, make: Any, words: str) -> None:
    pytest.importorskip("torchvision")
    make(tmp_path)
    spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ArgumentError, match=words) as caught:
        image_folder(tmp_path, spec, classes=3)
    assert caught.value.argument == "data"


def test_the_command_refuses_a_flat_folder(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3)
    checkpoint.save_weights(tmp_path / "w.safetensors", model)
    flat(tmp_path / "val")
    with pytest.raises(SystemExit):
        command.main(
            ["--data", str(tmp_path / "val"), "--model", "timm:resnet10t", "--classes", "3",
             "--weights", str(tmp_path / "w.safetensors"), "--forget", "1"]
        )  # fmt: skip
    assert re.search("0 folders and 1 files", capsys.readouterr().err)

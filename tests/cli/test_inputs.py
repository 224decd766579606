"""What a person types or points to: classes, numbers, labelled images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from zsu_fast import ArgumentError
from zsu_fast.cli.inputs import parse_classes, parse_numbers, parse_tail, read_images
from zsu_fast.models import zoo


def test_classes_from_text() -> None:
    assert parse_classes("1,2, 3") == [1, 2, 3]
    assert parse_classes("0-2,7") == [0, 1, 2, 7]
    assert parse_classes("5") == [5]


def test_numbers_and_tails_from_text() -> None:
    assert parse_numbers("mean", None, float) is None
    assert parse_numbers("mean", "0.5,1", float) == [0.5, 1.0]
    assert parse_numbers("input_shape", "3x32x32", int) == [3, 32, 32]
    with pytest.raises(ArgumentError, match=r"std: got '0\.5;1'"):
        parse_numbers("std", "0.5;1", float)
    assert [parse_tail(text) for text in ("2", "last", "fc1")] == [2, "last", "fc1"]


def test_a_folder_of_images(tmp_path: Path) -> None:
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

"""Folders, .npz files and class names on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import QUICK, call

from zsu_fast import ArgumentError, UnlearningWarning, evaluate
from zsu_fast.cli.demo import mnist_test
from zsu_fast.cli.inputs import folder_order, parse_classes, read_images
from zsu_fast.models import zoo
from zsu_fast.models.labels import Labels

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPEC = zoo.ZOO["lenet5"].spec
FORGET = ["--forget", "1,2"]


def raw(count: int = 60) -> tuple[Any, Any]:
    """The first MNIST images as uint8 [N, 1, 28, 28], and their labels."""
    with np.load(zoo.ASSETS / "mnist_test_2000.npz") as file:
        order = np.random.default_rng(0).permutation(2000)[:count]
        return file["images"][order], file["labels"][order].astype(np.int64)


def digits(path: Path, names: list[str], count: int = 60) -> None:
    """Writes MNIST images into a folder per digit; "" leaves a digit out."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    for number, (pixels, label) in enumerate(zip(*raw(count), strict=True)):
        if names[label]:
            place = path / names[label]
            place.mkdir(parents=True, exist_ok=True)
            # so large that resizing to 32 and the crop to 28 leave the digit as it is
            padded = np.pad(pixels[0], 2)
            image.fromarray(padded).save(place / f"{number}.png")


def accuracies(path: Path, *options: str, code: int = 0) -> dict[str, Any]:
    command = ["evaluate", "lenet5", "--data", str(path), *FORGET, *options, "--json"]
    found: dict[str, Any] = json.loads(call(*command, code=code))
    return found


# --- classes as they are typed ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("tench,goldfish", ["tench", "goldfish"]),
        ("great white shark, 3, 5-6", ["great white shark", 3, 5, 6]),
        ('"3-9","7", 7', ['"3-9"', '"7"', 7]),
        ('"maillot, tank suit"', ['"maillot, tank suit"']),
        ("#7", [7]),
        ("1 2 3", [1, 2, 3]),
        ("n01440764", ["n01440764"]),
        ("forget-me-not", ["forget-me-not"]),
    ],
)
def test_names_and_numbers(text: str, classes: list[Any]) -> None:
    assert parse_classes(text) == classes


def test_a_file_of_names(tmp_path: Path) -> None:
    path = tmp_path / "forget.txt"
    path.write_text("great white shark\ntench\n3, 5-6\n")
    assert parse_classes(str(path)) == ["great white shark", "tench", 3, 5, 6]


def test_a_number_that_is_also_a_name() -> None:
    ages = Labels(("3-9", "0-2", "7"), "the model's id2label")
    for text in ("7", "0-2", "3-9,1"):
        with pytest.raises(ArgumentError, match=r"also the name of class \d.*Write #"):
            parse_classes(text, ages)
    assert parse_classes('"0-2",#1-2,1', ages) == ['"0-2"', 1, 2, 1]


@pytest.mark.parametrize("text", ["", " , ", "9-3"])
def test_classes_that_are_none(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"^forget: got"):
        parse_classes(text)


# --- folders ---------------------------------------------------------------------------------


def test_folders_of_any_spelling_give_the_same(tmp_path: Path) -> None:
    expected = None
    for kind, names in (
        ("numbers", [str(d) for d in range(10)]),
        ("padded", [f"{d:03d}" for d in range(10)]),
        ("words", WORDS),
        ("mixed", [*WORDS[:5], "5", "06", "SEVEN", "8 - eight", "Nine"]),
    ):
        digits(tmp_path / kind, names)
        (tmp_path / kind / ".hidden").mkdir()
        found = accuracies(tmp_path / kind)
        assert found.pop("data_classes") == {n: names.index(n) for n in sorted(names)}
        assert found["forget_accuracy"] > 90, kind
        assert found["retain_accuracy"] > 90, kind
        assert found["labels"] == {"1": "one", "2": "two"}
        assert expected in (None, found)
        expected = found


def test_a_folder_is_missing(tmp_path: Path) -> None:
    digits(tmp_path / "numbers", [str(d) if d != 4 else "" for d in range(10)])
    found = accuracies(tmp_path / "numbers")
    assert found["overall_accuracy"] > 90
    assert "4" not in found["data_classes"]


def test_folders_that_are_no_classes_of_the_model(tmp_path: Path) -> None:
    digits(tmp_path / "letters", list("abcdefghij"))
    error = accuracies(tmp_path / "letters", code=2)["error"]
    assert "got 'a', which is no class in the model's class_names" in error
    assert accuracies(tmp_path / "letters", "--class-names", "sorted")["forget_accuracy"] > 90
    names = tmp_path / "names.txt"
    names.write_text("\n".join("abcdefghij"))
    assert accuracies(tmp_path / "letters", "--class-names", str(names))["overall_accuracy"] > 90
    names.write_text("\n".join("abcdefghi"))
    error = accuracies(tmp_path / "letters", "--class-names", str(names), code=2)["error"]
    assert "9 names, the model has 10 logits" in error
    digits(tmp_path / "from one", [str(d + 1) for d in range(10)])
    error = accuracies(tmp_path / "from one", code=2)["error"]
    assert "10 is out of range" in error
    assert "count from 1" in error
    digits(tmp_path / "parts" / "train", WORDS, 10)
    assert "not classes. Name one" in accuracies(tmp_path / "parts", code=2)["error"]


def test_the_map_is_printed(tmp_path: Path) -> None:
    digits(tmp_path / "words", WORDS, 20)
    command = ["evaluate", "lenet5", "--data", str(tmp_path / "words"), "--forget", "three, 1"]
    text = " ".join(call(*command).split())
    assert "Forgotten: 1 (one), 3 (three)." in text
    assert "eight = 8 (eight)" in text


def test_an_image_that_can_not_be_read(tmp_path: Path) -> None:
    digits(tmp_path / "words", WORDS, 20)
    (tmp_path / "words" / "one" / "x.png").write_bytes(b"none")
    assert "x.png can't be read" in accuracies(tmp_path / "words", code=2)["error"]


def test_files_beside_the_folders_are_told(tmp_path: Path) -> None:
    digits(tmp_path / "words", WORDS, 20)
    (tmp_path / "words" / "x.png").write_bytes(b"none")
    with pytest.warns(UnlearningWarning, match="1 files lie beside the folders"):
        read_images(str(tmp_path / "words"), SPEC)


def test_sorted_needs_folders() -> None:
    with pytest.raises(ArgumentError, match="no folders to sort"):
        folder_order("sorted", mnist_test())


# --- .npz files ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "layout", "words"),
    [
        (("images", "labels"), "NCHW", "uint8: they are normalised"),
        (("x", "y"), "NHWC", "'x' are taken as images.*channels come last"),
        (("X_test", "y_test"), "NHW", "'X_test' are taken as images.*no channel"),
        (("image", "label"), "NCHW", "'image' are taken as images"),
        (("test_images", "test_labels"), "NCHW", "'test_images' are taken as images"),
        (("arr_0", "arr_1"), "NCHW", "'arr_0' are taken as images"),
    ],
)
def test_npz_files(tmp_path: Path, keys: tuple[str, str], layout: str, words: str) -> None:
    images, labels = raw()
    stored = {"NCHW": images, "NHWC": images.transpose(0, 2, 3, 1), "NHW": images[:, 0]}[layout]
    more = {"train_images": stored, "train_labels": labels} if "test_images" in keys else {}
    np.savez(tmp_path / "a.npz", **{keys[0]: stored, keys[1]: labels[:, None]}, **more)
    with pytest.warns(UnlearningWarning) as caught:
        data = read_images(str(tmp_path / "a.npz"), SPEC)
    told = " ".join(str(w.message) for w in caught)
    assert all(word in told for word in words.split(".*")), told
    model = zoo.load("lenet5")
    expected = evaluate(model, (SPEC.normalise(torch.from_numpy(images)), labels), [1, 2])
    assert evaluate(model, data, [1, 2]) == expected


def test_npz_labels_that_are_names(tmp_path: Path) -> None:
    images, labels = raw()
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(WORDS)[labels])
    assert accuracies(tmp_path / "a.npz")["forget_accuracy"] > 90
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([*WORDS[:9], "ten"])[labels])
    assert "got 'ten', which is no class" in accuracies(tmp_path / "a.npz", code=2)["error"]


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": 0, "answers": 1}, "holds 'pictures', 'answers': no pairs"),
        ({"x": 0, "y": 1, "data": 0, "targets": 1}, "several pairs"),
        ({"images": 0, "Images": 0, "labels": 1}, "'images' and 'Images'"),
        ({"images": 0, "labels": 2}, "labels are torch.float64"),
        ({"images": 0, "labels": 3}, "labels run from 1 to 10"),
        ({"images": 0, "labels": 4}, "object"),
    ],
)
def test_npz_files_that_are_refused(tmp_path: Path, arrays: dict[str, int], words: str) -> None:
    images, labels = raw()
    parts = [images, labels, labels + 0.5, labels + 1, labels.astype(object)]
    np.savez(tmp_path / "a.npz", **{key: parts[index] for key, index in arrays.items()})
    error = accuracies(tmp_path / "a.npz", code=2)["error"].lower()
    assert words.lower() in error


# --- names in unlearn and audit --------------------------------------------------------------


def test_unlearn_and_audit_by_name(tmp_path: Path) -> None:
    digits(tmp_path / "words", WORDS)
    out = tmp_path / "out.safetensors"
    text = call("unlearn", "lenet5", "--forget", "two,one", "--out", str(out), *QUICK)
    assert "Forgotten: 1 (one), 2 (two)." in text
    command = ["audit", "lenet5", "--unlearned", str(out), "--forget", "one,two", "--data",
               str(tmp_path / "words"), "--relearn-steps", "0"]  # fmt: skip
    page = tmp_path / "r.html"
    found = json.loads(call(*command, "--report", str(page), "--json"))
    assert found["forget"] == [1, 2]
    assert found["settings"]["data_classes"]["zero"] == 0
    stored = json.loads(page.with_suffix(".json").read_text())["audit"]["settings"]
    assert stored["labels"] == {"1": "one", "2": "two"}
    assert stored["data_classes"] == found["settings"]["data_classes"]
    refused = call("unlearn", "lenet5", "--forget", "too", "--out", str(out), "--force", code=2)
    assert "Did you mean 'two' (2)?" in " ".join(refused.split())

"""Names of classes: where they come from, and what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import QUICK, SPEC, tiny
from torch import nn

import zsu_fast
from zsu_fast import ArgumentError, Ledger, UnlearningWarning
from zsu_fast.models.labels import (
    Labels,
    class_indices,
    class_names,
    known_labels,
    read_class_names,
    resolve_labels,
)
from zsu_fast.models.loading import load_model

FISH = ("tench, Tinca tinca", "goldfish", "great white shark", "crane", "crane")


def indices(*entries: str | int, names: Any = FISH, **options: Any) -> list[int]:
    return class_indices(entries, names, len(names), **options)


def named(*names: str) -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, len(names)))
    model.class_names = list(names)  # type: ignore[assignment]
    return model


# --- names to classes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "index"),
    [
        ("tench", 0), ("Tinca tinca", 0), ("tench, Tinca tinca", 0), ("Tinca tinca,tench", 0),
        ("GOLDFISH", 1), ("great_white-shark", 2), (" goldfish ", 1), (4, 4), ("4", 4), ("#3", 3),
        ("004", 4), ("003.Goldfish", 1), ("2 - goldfish", 1),
    ],
)  # fmt: skip
def test_what_an_entry_means(entry: str | int, index: int) -> None:
    assert indices(entry) == [index]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("crane", r"any of the classes 3 \(crane\), 4 \(crane\).*number"),
        ("goldfisch", r"no class in class_names.*Did you mean 'goldfish' \(1\)\?"),
        ("5", "5 is out of range, the model has 5 logits"),
        (-1, "-1 is out of range"),
        ("tench, goldfish", "no class"),
        ("", "no class"),
    ],
)
def test_an_entry_that_means_no_class_or_several(entry: str | int, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"^forget: got .*{words}"):
        indices(entry)


def test_case_counts_where_names_differ_in_nothing_else() -> None:
    letters = ("A", "B", "a", "b")
    assert indices("a", "A", names=letters) == [2, 0]
    with pytest.raises(ArgumentError, match=r"any of the classes 0 .*1 "):
        indices("MOUSE", names=("mouse", "Mouse"))


def test_composed_and_decomposed_letters_are_equal() -> None:
    assert indices("cre\u0300me", names=("x", "cr\u00e8me")) == [1]


def test_a_number_that_is_also_the_name_of_another_class() -> None:
    digits = ("7", "2", "0")
    with pytest.raises(ArgumentError, match=r"number of a class and the name of class 2.*#0"):
        indices("0", names=digits)
    assert indices("#0", '"0"', 0, names=digits) == [0, 2, 0]
    assert indices("0", "7", names=digits, names_first=True) == [2, 0]


def test_names_of_a_model_that_knows_none() -> None:
    assert class_indices(["3", 1], None, 4) == [3, 1]
    with pytest.raises(ArgumentError, match="names of the model's classes are not known"):
        class_indices(["tench"], None, 4)


# --- what models state -----------------------------------------------------------------------


def test_names_in_an_attribute_and_through_wrappers() -> None:
    model = named("a", "b", "c")
    assert class_names(model, 3) == ("a", "b", "c")
    assert class_names(nn.Sequential(nn.Identity(), model), 3) == ("a", "b", "c")
    assert class_names(nn.DataParallel(model), 3) == ("a", "b", "c")
    assert class_names(nn.Sequential(model, nn.Linear(3, 3)), 3) is None  # other outputs
    assert class_names(model, 4) is None
    assert class_names(tiny(), 5) is None


def test_names_of_a_transformers_model() -> None:
    transformers = pytest.importorskip("transformers")

    def model(**labels: Any) -> nn.Module:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], **labels)
        return transformers.ResNetForImageClassification(config)

    labels = known_labels(model(id2label={0: "cat", 1: "dog"}), 2)
    assert labels is not None
    assert (labels.names, labels.source) == (("cat", "dog"), "the model's id2label")
    assert class_names(model(num_labels=3), 3) is None  # LABEL_0, LABEL_1, ... say nothing
    contradicting = model(id2label={0: "cat", 1: "dog"}, label2id={"cat": 1, "dog": 0})
    assert class_names(contradicting, 2) is None


def test_names_of_imagenet_models() -> None:
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")
    by_timm = known_labels(timm.create_model("resnet10t"), 1000)
    by_torchvision = known_labels(models.resnet18(), 1000)
    for labels in (by_timm, by_torchvision):
        assert labels is not None
        assert class_indices(["n01440764", "goldfish", "n02012849"], labels, 1000) == [0, 1, 134]
        assert "is not known" in labels.assumed
    assert class_names(timm.create_model("resnet10t", num_classes=10), 10) is None
    assert class_names(models.resnet18(num_classes=10), 10) is None
    assert by_timm is not None
    background = Labels(("background", *by_timm.names), "1,001 classes", given=True)
    assert class_indices(["n01440764", "tench"], background, 1001) == [1, 1]
    moved = Labels((by_timm.names[1], by_timm.names[0], *by_timm.names[2:]), "swapped")
    with pytest.raises(ArgumentError, match="no class in swapped"):
        class_indices(["n01440764"], moved, 1000)


def test_names_that_are_only_assumed_are_told() -> None:
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")
    for model, words in (
        (timm.create_model("resnet10t"), r"tench.*assumed.*timm's weights resnet10t\.c3_in1k"),
        (models.squeezenet1_1(), r"tench.*torchvision's weights SqueezeNet1_1_Weights\.IMAGENET"),
    ):
        with pytest.warns(UnlearningWarning, match=f"^class_names: not given.*{words}"):
            resolve_labels(None, model, 1000)
        assert resolve_labels(class_names(model), model, 1000) is not None  # confirmed
        own = resolve_labels([f"mine {i}" for i in range(1000)], model, 1000)
        assert own is not None
        assert own.names[0] == "mine 0"


def test_a_number_of_classes_alone_does_not_make_imagenet() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t")
    model.pretrained_cfg = dict(model.pretrained_cfg, tag="my_photos")
    assert known_labels(model, 1000) is None
    model.pretrained_cfg["tag"] = "augreg_in21k"
    assert known_labels(model, 1000) is None
    model.pretrained_cfg["tag"] = "augreg_in21k_ft_in1k"
    assert known_labels(model, 1000) is not None


def test_weights_that_a_library_publishes_are_of_known_classes(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    models = pytest.importorskip("torchvision.models")
    built = {
        "torchvision:squeezenet1_1": (models.squeezenet1_1(), "squeezenet1_1-b8a52dc0.pth"),
        "timm:resnet10t": (timm.create_model("resnet10t"), "resnet10t_176_c3-f3215ab1.pth"),
    }
    for name, (model, file) in built.items():
        for published in (file, "own.pth"):
            torch.save(model.state_dict(), tmp_path / published)
            loaded = load_model(name, str(tmp_path / published))
            labels = known_labels(loaded, 1000)
            assert labels is not None
            assert (labels.assumed == "") == (published == file)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("tench, Tinca tinca\ngoldfish\n", ("tench, Tinca tinca", "goldfish")),
        ("\ufeffa\r\nb\r\n", ("a", "b")),
        ("1: b\n0: a\n", ("a", "b")),
        ("0\ta\n1\tb", ("a", "b")),
        ("n01440764 tench\nn01443537 goldfish", ("tench", "goldfish")),
        ("n01440764\nn01443537", ("n01440764", "n01443537")),
        ('["a", "b"]', ("a", "b")),
        ('{"1": "b", "0": "a"}', ("a", "b")),
        ('{"b": 1, "a": 0}', ("a", "b")),
        ('{"0": ["n01440764", "tench"], "1": ["n01443537", "goldfish"]}', ("tench", "goldfish")),
        ('{"id2label": {"0": "a", "1": "b"}, "model_type": "vit"}', ("a", "b")),
    ],
)
def test_files_of_names(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    path = tmp_path / "names"
    path.write_text(text, encoding="utf-8")
    labels = read_class_names(path, 2)
    assert labels.names == names
    if "n01440764" in text:
        assert labels.find("n01443537") == {1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb\nc", r"3 names, the model has 2 logits"),
        ("a", r"1 names, the model has 2 logits.*background"),
        ("1 a\n2 b", r"numbered 1 to 2.*Number them 0 to 1"),
        ("a\n\nb", r"line 2 .* is empty"),
        ('{"0": "a", "2": "b"}', "without gaps"),
        ('{"a": 0, "b": 0}', "without gaps"),
        ('{"0": "a", "0": "b"}', "a key occurs twice"),
        ('["a", 1]', "one name per class"),
        ("[", "not valid JSON"),
        ("", "one name per class"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "names"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=f"^class_names: .*{words}"):
        read_class_names(path, 2)


@pytest.mark.parametrize("given", [["a"], ["a", ""], {0: "a", 2: "b"}, {"a": 0, "b": 0}])
def test_errors_name_class_names_once(given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^class_names: ") as caught:
        resolve_labels(given, tiny(), 5)
    assert str(caught.value).count("class_names") == 1


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"class_names: .*none\.txt can't be read"):
        read_class_names(tmp_path / "none.txt", 2)


def test_given_names_count_and_a_contradiction_is_told() -> None:
    model = named("a", "b", "c")
    with pytest.warns(UnlearningWarning, match=r"class 0 is 'b' there, but class 1 has this name"):
        labels = resolve_labels(["b", "a", "c"], model, 3)
    assert labels is not None
    assert labels.names == ("b", "a", "c")
    same = resolve_labels({0: "a", 1: "B", 2: "c"}, model, 3)
    assert same is not None
    with pytest.raises(ArgumentError, match="class_names: got a int"):
        resolve_labels(3, model, 3)


def test_a_head_of_1001_classes_is_told() -> None:
    with pytest.warns(UnlearningWarning, match="class 0 is the background, and tench is 1, not 0"):
        assert resolve_labels(None, nn.Linear(4, 1001), 1001) is None


# --- names in runs ---------------------------------------------------------------------------

RUN: dict[str, Any] = QUICK | {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}


@pytest.mark.filterwarnings("ignore:level. output")
def test_forgetting_by_name(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "ledger"
    model.class_names = ["tench", "gold fish", "shark", "hen, biddy", "jay"]
    run = zsu_fast.ZeroShotUnlearner(model, ["biddy", "Gold_Fish"], ledger=path, **RUN)
    result = run.run()
    assert run.forget == [1, 3]
    assert run.record.labels == {"1": "gold fish", "3": "hen, biddy"}
    assert json.loads(run.record.to_json())["labels"]["3"] == "hen, biddy"
    assert Ledger(path).entries()[0]["metrics"]["labels"] == run.record.labels
    by_number = zsu_fast.unlearn(tiny(), [1, 3], **RUN)
    assert torch.equal(result.fc2.weight, by_number.fc2.weight)


@pytest.mark.filterwarnings("ignore:level. output")
def test_a_run_without_names_records_none(tmp_path: Path) -> None:
    run = zsu_fast.ZeroShotUnlearner(tiny(), [1], ledger=tmp_path / "ledger", **RUN)
    run.run()
    assert run.record.labels == {}
    assert "labels" not in Ledger(tmp_path / "ledger").entries()[0]["metrics"]


def test_names_given_to_a_run() -> None:
    run = zsu_fast.ZeroShotUnlearner(tiny(), "b", class_names=list("abcde"), **RUN)
    assert run.forget == [1]
    with pytest.raises(ArgumentError, match=r"^forget: got 'f'"):
        zsu_fast.ZeroShotUnlearner(tiny(), ["f"], class_names=list("abcde"), **RUN)
    with pytest.raises(ArgumentError, match="4 names, the model has 5 logits"):
        zsu_fast.ZeroShotUnlearner(tiny(), [1], class_names=list("abcd"), **RUN)

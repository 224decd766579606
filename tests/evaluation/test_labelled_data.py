"""Labelled data as people have it: the right classes and pixels, or an error."""

from __future__ import annotations

import copy
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import SPEC, tiny, tiny_data
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from benchmarks.stress.fuzz_data import fuzz
from zsu_fast import ArgumentError, ModelError, UnlearningWarning, evaluate, mask
from zsu_fast.evaluation.audit import audit
from zsu_fast.evaluation.class_order import check_order
from zsu_fast.evaluation.data_classes import classes_of, map_classes
from zsu_fast.models.labels import Labels

NAMES = ["hen", "jay", "tench", "robin", "crane"]


def model(names: list[str] | None = None, spec: bool = False) -> nn.Module:
    made = tiny()
    if names is not None:
        made.class_names = names
    if spec:
        made.input_spec = SPEC
    return made


def raw() -> tuple[Tensor, Tensor]:
    """The tiny data as uint8 images."""
    images, labels = tiny_data(100)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (SPEC.mean, SPEC.std))
    return ((images * std + mean) * 255).round().to(torch.uint8), labels


class Rows(torch.utils.data.Dataset[Any]):
    """Rows of (image, label); never raises IndexError, as many data sets."""

    def __init__(self, order: list[int] | None = None, count: int = 100, **stated: Any) -> None:
        self.images, labels = tiny_data(count)
        self.labels = labels if order is None else torch.tensor(order)[labels]
        vars(self).update(stated)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        index %= len(self.labels)
        return self.images[index], int(self.labels[index])


ORDER = [2, 0, 4, 3, 1]  # the number that the data gives each of the model's classes
IN_ORDER = [NAMES[ORDER.index(i)] for i in range(5)]
EXPECTED = evaluate(tiny(), tiny_data(100), [1, 3])


def figures(result: Any) -> tuple[Any, ...]:
    return result.forget_accuracy, result.retain_accuracy, result.per_class


def folder_like(names: list[str], order: list[int] | None = ORDER) -> Rows:
    return Rows(order, classes=names, class_to_idx={n: i for i, n in enumerate(names)}, samples=[])


# --- classes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [
    lambda d: d, lambda d: DataLoader(d, 7), lambda d: Subset(d, range(100)),
    lambda d: DataLoader(ConcatDataset([d]), 7),
])  # fmt: skip
def test_a_data_set_with_other_numbers_is_mapped_by_name(wrap: Any) -> None:
    result = evaluate(model(NAMES), wrap(folder_like(IN_ORDER)), ["jay", "robin"])
    assert figures(result) == figures(EXPECTED)
    assert result.data_classes == {name: NAMES.index(name) for name in IN_ORDER}
    assert result.labels == {"1": "jay", "3": "robin"}


def test_folders_of_numbers_are_numbers() -> None:
    names = [str(ORDER.index(i)) for i in range(5)]
    assert figures(evaluate(tiny(), folder_like(names), [1, 3])) == figures(EXPECTED)


def test_class_names_of_a_model_that_knows_none() -> None:
    data = folder_like(IN_ORDER)
    assert figures(evaluate(tiny(), data, [1, 3], class_names=NAMES)) == figures(EXPECTED)


def test_an_unknown_order_is_held_against_the_predictions() -> None:
    assert figures(evaluate(tiny(), folder_like(sorted(NAMES), None), [1, 3])) == figures(EXPECTED)
    with pytest.raises(ArgumentError, match=r"^data: the names .* not known.*predicts most images"):
        evaluate(tiny(), folder_like(IN_ORDER), [1, 3])


def test_an_unknown_order_of_a_model_that_forgot() -> None:
    forgot = mask(tiny(), [1, 3])
    right = evaluate(forgot, folder_like(NAMES, None), [1, 3])
    assert (right.forget_accuracy, right.retain_count) == (0, 60)
    for order in ([2, 1, 0, 3, 4], [4, 0, 1, 2, 3], ORDER):
        with pytest.raises(ArgumentError, match="in the order of the data's classes the model"):
            evaluate(forgot, folder_like(NAMES, order), [1, 3])


def test_images_of_a_retained_class_in_the_place_of_a_forgotten_one() -> None:
    found = map_classes(["a", "b", "c"], 3, None)
    labels = torch.arange(3).repeat_interleave(10)
    # class 0 is forgotten, and its images are mostly seen as class 1
    right = torch.tensor([1] * 6 + [2] * 4 + [1] * 10 + [2] * 10)
    assert check_order(right, labels, 3, [0], found) == ""
    swapped = torch.cat([right[10:20], right[:10], right[20:]])
    with pytest.raises(ArgumentError, match="most images of 'a'"):
        check_order(swapped, labels, 3, [0], found)
    with pytest.raises(ArgumentError, match="most images of 'a'"):  # class 1 has no images
        check_order(right[labels != 1], labels[labels != 1], 3, [0], found)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([*NAMES[:4], "robin redbreast"], "no class in the model's class_names"),
        ([*NAMES[:4], "Hen"], "'hen' and 'Hen' are both class 0"),
        (["1", "2", "3", "4", "5"], "5 is out of range"),
    ],
)
def test_classes_that_are_not_the_models(names: list[str], words: str) -> None:
    with pytest.raises(ArgumentError, match=f"^data: .*{words}"):
        evaluate(model(NAMES), folder_like(names, None), [1])


def test_another_number_of_classes_than_logits() -> None:
    with pytest.raises(ArgumentError, match=r"it has 4 classes.*5 logits.*--class-names"):
        map_classes(NAMES[:4], 5, None)
    with pytest.raises(ArgumentError, match="it has 5 classes"):
        map_classes(["0", *NAMES[1:]], 5, None)
    assert map_classes(NAMES[1:3], 5, Labels(tuple(NAMES), "x")).classes == {"jay": 1, "tench": 2}
    with pytest.raises(ArgumentError, match="count from 1"):
        map_classes(["1", "2", "3"], 3, None)


def test_what_data_sets_state() -> None:
    label = type("ClassLabel", (), {"names": ["a", "b"]})()
    assert classes_of(Rows(features={"label": label})) == (["a", "b"], True)
    assert classes_of(Rows(classes=["a", "b"])) == (["a", "b"], True)
    assert classes_of(Rows(wnids=["n00000001"], classes=[("a", "b")])) == (["n00000001"], True)
    assert classes_of(folder_like(["a", "b"])) == (["a", "b"], False)
    assert classes_of(Rows(classes=["a"], target_transform=int)) is None
    assert classes_of(Rows()) is None
    with pytest.raises(ArgumentError, match="number their classes differently"):
        classes_of(ConcatDataset([Rows(classes=["a", "b"]), Rows(classes=["b", "a"])]))


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # timm's data set leaves files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_data_sets_of_torchvision_and_timm(tmp_path: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    timm_data = pytest.importorskip("timm.data")
    image = pytest.importorskip("PIL.Image")
    pixels, labels = raw()
    for number in range(20):
        place = tmp_path / NAMES[int(labels[number])]
        place.mkdir(exist_ok=True)
        array = pixels[number].permute(1, 2, 0).numpy()
        image.fromarray(array).save(place / f"{number}.png")

    def transform(picture: Any) -> Tensor:
        return SPEC.normalise(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])[0]

    expected = evaluate(tiny(), (SPEC.normalise(pixels[:20]), labels[:20]), [1])
    for data in (datasets.ImageFolder(tmp_path, transform),
                 timm_data.create_dataset("", str(tmp_path), transform=transform)):  # fmt: skip
        result = evaluate(model(NAMES), DataLoader(data, 8), ["jay"])
        assert figures(result) == figures(expected)
        assert result.data_classes["tench"] == 2


def test_labels_of_another_numbering_are_told() -> None:
    images, labels = tiny_data()
    with pytest.warns(UnlearningWarning, match="look like those of another numbering"):
        evaluate(tiny(), (images, torch.tensor(ORDER)[labels]), [3])
    keep = labels < 4
    with pytest.raises(ArgumentError, match=r"off by one: most images of class 1 .* as class 0"):
        evaluate(tiny(), (images[keep], labels[keep] + 1), [3])


def test_a_collapsed_model_is_no_matter_of_numbering() -> None:
    labels = torch.arange(5).repeat(4)
    assert check_order(torch.zeros_like(labels), labels, 5, [3], None) == ""


# --- forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [
    ("pixel_values", "labels"), ("image", "label"), ("img", "label"), ("images", "labels"),
])  # fmt: skip
@pytest.mark.parametrize("kind", [dict, UserDict])
def test_dict_batches(keys: tuple[str, str], kind: Any) -> None:
    images, labels = tiny_data(100)
    batches = [
        kind({keys[0]: images[i : i + 30], keys[1]: labels[i : i + 30], "path": ["x"]})
        for i in range(0, 100, 30)
    ]
    assert evaluate(tiny(), batches, [1, 3]) == EXPECTED
    assert evaluate(tiny(), {keys[0]: images, keys[1]: labels.tolist()}, [1, 3]) == EXPECTED


def test_rows_arrays_and_texts() -> None:
    images, labels = tiny_data(100)
    assert evaluate(tiny(), Rows(), [1, 3]) == EXPECTED
    assert evaluate(tiny(), (images.numpy(), labels.numpy()), [1, 3]) == EXPECTED
    assert evaluate(tiny(), (images, labels.tolist()), [1, 3]) == EXPECTED
    texts = [NAMES[i] for i in labels.tolist()]
    assert figures(evaluate(model(NAMES), (images, texts), [1, 3])) == figures(EXPECTED)
    with pytest.raises(ArgumentError, match="names of the model's classes are not known"):
        evaluate(tiny(), (images, texts), [1, 3])


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"pixels": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2).long()}, "keys 'pixels'"),
        ({"images": torch.zeros(2, 3, 8, 8)}, "a dict with the keys 'images'"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), 3), "a tuple of 3, not a pair"),
        ((torch.zeros(2, 3, 8, 8), torch.tensor([0.0, 1.5])), "labels are torch.float32"),
        ((torch.zeros(2, 3, 8, 8), torch.eye(5)[:2]), r"argmax\(1\)"),
        ((torch.zeros(2, 3, 8, 8), torch.tensor([-1, 0])), "labels run from -1"),
        ((torch.zeros(2, 3, 8, 8).int(), torch.tensor([1, 0])), "images are torch.int32"),
    ],
)
def test_batches_that_are_refused(batch: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"^data: .*{words}"):
        evaluate(tiny(), [batch], [1])


def test_images_that_the_model_does_not_take() -> None:
    with pytest.raises(ArgumentError, match=r"the model raises for images of shape \(1, 8, 8\)"):
        evaluate(tiny(), (torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])), [1])


# --- pixels ----------------------------------------------------------------------------------


def test_uint8_images_are_normalised_as_the_model_states() -> None:
    stated: dict[str, Any] = {"input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std}
    for given, options in ((model(spec=True), {}), (tiny(), stated)):
        with pytest.warns(UnlearningWarning, match="uint8: they are normalised with mean 0.485"):
            result = evaluate(given, raw(), [1, 3], **options)
        assert figures(result) == figures(EXPECTED)


def test_uint8_images_without_mean_and_std_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"uint8, and the model does not state.*Pass mean"):
        evaluate(tiny(), raw(), [1])


def test_pictures() -> None:
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    images, labels = raw()
    rows = [
        {"image": image.fromarray(x.permute(1, 2, 0).numpy()), "label": int(y)}
        for x, y in zip(images, labels, strict=True)
    ]
    given = model(spec=True)
    given.input_spec = type(SPEC)(SPEC.shape, SPEC.mean, SPEC.std, "the tests", (8,))
    assert figures(evaluate(given, rows, [1, 3])) == figures(EXPECTED)
    with pytest.raises(ArgumentError, match="pictures, and the model does not state"):
        evaluate(tiny(), rows, [1])


def test_channels_last() -> None:
    images, labels = tiny_data(100)
    data = images.permute(0, 2, 3, 1), labels
    with pytest.warns(UnlearningWarning, match="channels come last"):
        assert figures(evaluate(model(spec=True), data, [1, 3])) == figures(EXPECTED)


UNIT, BYTES, SYMMETRIC = (0.0, 1.0), (0.0, 255.0), (-1.0, 1.0)
NORMALISED = (-2.1, 2.6)  # with ImageNet's mean and std
# what a model takes: mean and std, as given to `evaluate`
TAKES: dict[tuple[float, float], dict[str, Any]] = {
    UNIT: {"mean": 0, "std": 1},
    BYTES: {"mean": 0, "std": 1 / 255},
    SYMMETRIC: {"mean": 0.5, "std": 0.5},
    NORMALISED: {"mean": SPEC.mean, "std": SPEC.std},
}


def floats(low: float, high: float) -> tuple[Tensor, Tensor]:
    images, labels = raw()
    images[0, 0, 0, :2] = torch.tensor([0, 255])
    return images / 255 * (high - low) + low, labels


@pytest.mark.parametrize("takes", TAKES)
@pytest.mark.parametrize("given", TAKES)
def test_float_images_of_another_range_are_told(
    given: tuple[float, float], takes: tuple[float, float]
) -> None:
    options = TAKES[takes] | {"input_shape": SPEC.shape}
    if given == takes:
        evaluate(tiny(), floats(*given), [1], **options)  # without a warning
        return
    words = {
        UNIT: r"not normalised \(0 to 1\)",
        BYTES: r"not normalised \(0 to 255\)",
        SYMMETRIC: r"mean 0.5 and std 0.5 \(-1 to 1\)",
        NORMALISED: "normalised otherwise",
    }
    with pytest.warns(UnlearningWarning, match=f"^data: float images.*{words[given]}; the model"):
        evaluate(tiny(), floats(*given), [1], **options)


@pytest.mark.parametrize("given", TAKES)
def test_the_range_is_told_where_the_model_does_not_state_its_own(
    given: tuple[float, float],
) -> None:
    if given == NORMALISED:
        evaluate(tiny(), floats(*given), [1])  # without a warning
        return
    with pytest.warns(UnlearningWarning, match="run as they are.*taken to be trained on such"):
        evaluate(tiny(), floats(*given), [1])


def test_the_range_is_that_of_all_batches_and_told_once() -> None:
    images, labels = floats(*UNIT)
    with pytest.warns(UnlearningWarning, match="0 to 1") as caught:
        evaluate(model(spec=True), [(images[:5], labels[:5]), (images[5:], labels[5:])], [1])
    assert len(caught) == 1


def test_uint8_images_of_zeros_and_ones_are_told() -> None:
    images, labels = raw()
    with pytest.warns(UnlearningWarning, match="no pixel exceeds 1 of 255"):
        evaluate(model(spec=True), ((images > 127).to(torch.uint8), labels), [1])


def test_ranges_are_held_against_a_guess_too() -> None:
    with pytest.warns(UnlearningWarning, match=r"not normalised.*a guess\)"):
        evaluate(tiny(), floats(*UNIT), [1], input_shape=SPEC.shape)


# --- logits that are not finite --------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    broken = tiny()
    with torch.no_grad():
        broken.fc2.bias[2] = value
    with pytest.raises(ModelError, match="logits for 100 of 100 images are NaN or infinite"):
        evaluate(broken, tiny_data(100), [1])
    with pytest.raises(ModelError, match="NaN or infinite"):
        audit(tiny(), broken, [1], tiny_data(100), relearn_steps=0, progress=False)


def test_logits_that_overflow_on_some_images() -> None:
    images, labels = copy.deepcopy(tiny_data(10))
    images[3] = torch.nan
    with pytest.raises(ModelError, match="logits for 1 of 10 images"):
        evaluate(tiny(), (images, labels), [1])


def test_a_masked_class_may_be_at_minus_infinity() -> None:
    masked = tiny()
    with torch.no_grad():
        masked.fc2.bias[1] = -torch.inf
    assert evaluate(masked, tiny_data(), [1]).forget_accuracy == 0


# --- the audit, and many cases ---------------------------------------------------------------


def test_the_audit_maps_classes_by_name() -> None:
    options: dict[str, Any] = {
        "relearn_steps": 0, "progress": False, "impressions_per_class": 2,
        "input_shape": SPEC.shape, "mean": SPEC.mean, "std": SPEC.std,
    }  # fmt: skip
    given = model(NAMES)
    result = audit(given, mask(given, [1]), "jay", DataLoader(folder_like(IN_ORDER), 50), **options)
    assert result.forget == [1]
    assert result.settings["labels"] == {"1": "jay"}
    assert result.settings["data_classes"] == {name: NAMES.index(name) for name in IN_ORDER}
    assert result.row("original").evaluation.per_class == EXPECTED.per_class
    with pytest.raises(ArgumentError, match="names of the model's classes are not known"):
        audit(tiny(), mask(tiny(), [1]), [1], folder_like(IN_ORDER), **options)


def test_many_layouts_end_in_the_right_number_or_an_error() -> None:
    outcomes, wrong = fuzz(120, seed=50_000)
    assert not wrong
    assert outcomes["right"] > 50
    assert outcomes["refused"] > 20


def test_a_loader_of_tensors_has_no_names() -> None:
    assert classes_of(DataLoader(TensorDataset(*tiny_data(10)))) is None

"""Labels whose numbers are not the model's are noticed by its predictions."""

from __future__ import annotations

import random

import pytest
import torch
from support import tiny, tiny_data
from torch import Tensor

from zsu_fast import ArgumentError, UnlearningWarning, evaluate, mask
from zsu_fast.evaluation.class_order import check_order

CLASSES = 12


def data(
    order: dict[int, int], per_class: int = 20, right: float = 0.8, forgotten: int | None = None
) -> tuple[Tensor, Tensor]:
    """Predictions of a model that is often right, and labels of which some are exchanged.

    A forgotten class is predicted as any other one.
    """
    draw = random.Random(0)
    predictions, labels = [], []
    for true in range(CLASSES):
        others = [c for c in range(CLASSES) if c != true and c != forgotten]
        for i in range(per_class):
            sure = i < right * per_class and true != forgotten
            predictions.append(true if sure else draw.choice(others))
            labels.append(order.get(true, true))
    return torch.tensor(predictions), torch.tensor(labels)


@pytest.mark.parametrize("right", [0.6, 0.95])
@pytest.mark.parametrize(
    "order", [{2: 7, 7: 2}, {1: 4, 4: 9, 9: 1}, {0: 1, 1: 0, 5: 6, 6: 5}], ids=str
)
def test_a_few_exchanged_classes_are_named(order: dict[int, int], right: float) -> None:
    warning = check_order(*data(order, right=right), CLASSES, [3], None)
    assert "labels of some classes look exchanged" in warning
    for true, label in order.items():
        assert f"{label} as {true} (" in warning
    assert warning.count(" as ") == len(order) + 1  # and "as what they are labelled"


def test_few_images_suffice_if_the_model_is_sure_of_them() -> None:
    exchanged = {2: 7, 7: 2}
    assert "exchanged" in check_order(*data(exchanged, 5, 1.0), CLASSES, [3], None)
    assert check_order(*data(exchanged, 3, 1.0), CLASSES, [3], None) == ""


@pytest.mark.parametrize("order", [{2: 7, 7: 2}, {1: 4, 4: 7, 7: 1}], ids=str)
def test_a_forgotten_class_whose_number_was_exchanged(order: dict[int, int]) -> None:
    """Its images spread over others, but those of another class bear its number."""
    predictions, labels = data(order, forgotten=7)
    assert "exchanged" in check_order(predictions, labels, CLASSES, [7], None)
    assert check_order(*data({}, forgotten=7), CLASSES, [7], None) == ""


@pytest.mark.parametrize("per_class", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("classes", [2, 3, 5, 10, 100])
def test_a_bad_model_gives_no_alarm(classes: int, per_class: int) -> None:
    draw = torch.Generator().manual_seed(per_class)
    labels = torch.arange(classes).repeat_interleave(per_class)
    alarms = 0
    for _ in range(50):
        predictions = torch.randint(classes, labels.shape, generator=draw)
        alarms += check_order(predictions, labels, classes, [0], None) != ""
    assert alarms <= 1


def test_confused_classes_give_no_alarm() -> None:
    labels = torch.arange(CLASSES).repeat_interleave(20)
    collapsed = labels.clone()
    collapsed[(labels == 2) | (labels == 5)] = 7  # two classes are taken for a third one
    assert check_order(collapsed, labels, CLASSES, [3], None) == ""
    collapsed[labels == 7] = 8
    assert check_order(collapsed, labels, CLASSES, [3], None) == ""
    fine = labels.clone()
    fine[labels == 2] = torch.tensor([2, 7] * 10)  # two that nothing tells apart
    fine[labels == 7] = torch.tensor([7, 2] * 10)
    assert check_order(fine, labels, CLASSES, [3], None) == ""


def test_a_single_confusion_does_not_hide_another_numbering() -> None:
    predictions, labels = data({c: (5 * c) % CLASSES for c in range(CLASSES)})
    predictions[labels == 5] = int(predictions[labels == 10].mode().values)
    warning = check_order(predictions, labels, CLASSES, [], None)
    assert "another numbering" in warning


def test_off_by_one_takes_more_than_two_images() -> None:
    labels = torch.tensor([1, 2, 3])
    assert check_order(labels - 1, labels, 4, [0], None) == ""
    with pytest.raises(ArgumentError, match="off by one"):
        check_order((labels - 1).repeat(6), labels.repeat(6), 4, [0], None)


def test_evaluate_warns_of_exchanged_labels() -> None:
    images, labels = tiny_data()
    exchanged = torch.tensor([0, 1, 4, 3, 2])[labels]
    for model in (tiny(), mask(tiny(), [1])):
        with pytest.warns(UnlearningWarning, match=r"^data: .*(exchanged|another numbering).* 2 "):
            evaluate(model, (images, exchanged), [1])

"""How a multi-label model is recognised, and where its logits come from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from multi_label_case import several
from support import SPEC, Returning, tiny
from torch import Tensor, nn

from zsu_fast import ArgumentError, ModelError
from zsu_fast.models.multi_label import log_probabilities, multi_hot
from zsu_fast.models.prepare import PreparedModel, prepare_model


class EndsInFunction(nn.Module):
    """A sigmoid in ``forward``, and a view after it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.inner(x)).view(len(x), -1)


def prepared(model: nn.Module, multi_label: bool | None = None) -> PreparedModel:
    return prepare_model(model, None, SPEC.shape, SPEC.mean, SPEC.std, multi_label=multi_label)


def stating(problem_type: str | None) -> nn.Module:
    """A wrapper of a model with a config."""
    model = several()
    model.config = SimpleNamespace(problem_type=problem_type)
    return Returning(model, lambda logits: logits)


def test_a_config_says_so_also_behind_a_wrapper() -> None:
    found = prepared(stating("multi_label_classification"))
    assert found.multi_label
    assert not found.notes
    for other in (None, "single_label_classification"):
        assert not prepared(stating(other)).multi_label
    assert not prepared(tiny()).multi_label


def test_the_user_has_the_last_word() -> None:
    assert prepared(several(), True).multi_label
    found = prepared(stating("multi_label_classification"), False)
    assert not found.multi_label
    assert "multi_label=False" in found.notes[0]


def test_a_regression_is_refused() -> None:
    with pytest.raises(ModelError, match="problem_type='regression'"):
        prepared(stating("regression"))


@pytest.mark.parametrize("value", [1, 0, "yes"])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="multi_label: got"):
        prepared(several(), value)


@pytest.mark.parametrize("scale", [torch.softmax, torch.log_softmax])
def test_a_softmax_is_no_multi_label_model(scale: Any) -> None:
    model = Returning(several(), lambda logits: scale(logits, 1))
    with pytest.raises(ModelError, match="of a softmax, so that its classes exclude each other"):
        prepared(model, True)
    assert not prepared(model).multi_label


def test_probabilities_whose_logits_are_not_found_are_refused() -> None:
    model = Returning(several(), lambda logits: 1 / (1 + torch.exp(-logits)))
    with pytest.raises(ModelError, match="what its sigmoid takes was not found"):
        prepared(Returning(model, lambda p: torch.where(p > 0, p, p)), True)


@pytest.mark.parametrize("place", [0, 1])
def test_a_sigmoid_of_one_of_several_outputs(place: int) -> None:
    def both(logits: Tensor) -> tuple[Tensor, ...]:
        pair = (torch.sigmoid(logits), logits.mean(1))
        return pair if place == 0 else pair[::-1]

    model = Returning(several(), both)
    found = prepare_model(model, None, SPEC.shape, SPEC.mean, SPEC.std, output=place)
    assert found.multi_label


@pytest.mark.parametrize("end", [lambda m: nn.Sequential(m, nn.Sigmoid()), EndsInFunction])
def test_a_sigmoid_at_the_end_is_noticed_and_left_out(end: Any) -> None:
    model, images = several(), 4 * torch.randn(50, *SPEC.shape)
    found = prepared(end(model))
    assert found.multi_label
    assert "ends in a sigmoid" in found.notes[0]
    assert len(found.notes) == 1  # the probe does not say it again
    assert not prepared(end(model), True).notes
    with torch.no_grad():
        want, got = model(images), found.model(images)
    near = want.abs() < 9  # farther from 0, float32 probabilities near 1 have few digits
    assert near.any()
    assert torch.allclose(got[near], want[near], atol=1e-2)
    assert torch.equal(got >= 0, want >= 0)
    assert not prepared(end(model), False).multi_label


def test_log_probabilities_of_both_kinds() -> None:
    logits = torch.randn(3, 4)
    assert torch.allclose(log_probabilities(logits, True).exp(), logits.sigmoid())
    assert torch.allclose(log_probabilities(logits, False).exp(), logits.softmax(1))


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([[1, 0, 1], [0, 0, 0]]),
        torch.tensor([[1.0, 0, 1], [0, 0, 0]]),
        torch.tensor([[True, False, True], [False] * 3]),
        [[0, 2], []],
        [torch.tensor([2, 0]), torch.tensor([])],
        [torch.tensor([1, 0, 1]), torch.tensor([0, 0, 0])],
        [[1, 0, 1], [0, 0, 0]],
        np.array([[1, 0, 1], [0, 0, 0]]),
    ],
)
def test_labels_of_all_forms(labels: Any) -> None:
    found = multi_hot(labels, 3, "data")
    assert found.dtype == torch.bool
    assert found.tolist() == [[True, False, True], [False, False, False]]


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (torch.tensor([[0.5, 0, 1]]), "other values than 0 and 1"),
        (torch.tensor([[2, 0, 1]]), "other values than 0 and 1"),
        (torch.tensor([[1, 0]]), r"the shape \(1, 2\), the model has 3 logits"),
        ([[3]], r"\[3\], the model has 3 logits"),
        ([[-1]], r"\[-1\], the model"),
        (torch.tensor([2, 0]), "one class per image"),
        ([["cat"]], "can't be read"),
        ([[0.5]], r"\[0.5\], the model"),
    ],
)
def test_other_labels_are_refused(labels: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=f"data: .*{says}"):
        multi_hot(labels, 3, "data")


def test_labels_that_may_mean_either_are_refused() -> None:
    with pytest.raises(ArgumentError, match="may be class indices, or 0 and 1"):
        multi_hot([[0, 1], [1, 0]], 2, "data")
    assert multi_hot([[0, 1], [1]], 2, "data").tolist() == [[True, True], [False, True]]
    assert multi_hot([[0, 1], [1, 1]], 2, "data").tolist() == [[False, True], [True, True]]

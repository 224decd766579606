"""How a multi-label model is recognised, and where its logits come from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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


@pytest.mark.parametrize("end", [lambda m: nn.Sequential(m, nn.Sigmoid()), EndsInFunction])
def test_a_sigmoid_at_the_end_is_noticed_and_left_out(end: Any) -> None:
    model, images = several(), 4 * torch.randn(50, *SPEC.shape)
    found = prepared(end(model))
    assert found.multi_label
    assert "ends in a sigmoid" in found.notes[0]
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
        ([[0.5]], r"\[0.5\], the model"),
    ],
)
def test_other_labels_are_refused(labels: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=f"data: .*{says}"):
        multi_hot(labels, 3, "data")

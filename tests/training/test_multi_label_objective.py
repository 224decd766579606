"""The objectives of multi-label models: `MultiLabelKL` and `MultiLabelDeepObjective`."""

from __future__ import annotations

import pytest
import torch
from feature_case import case
from torch import Tensor

from zsu_fast import ArgumentError
from zsu_fast.training.features import FeatureSet, absence_margin
from zsu_fast.training.losses import MultiLabelKL, ObjectiveSettings

FORGET = torch.tensor([False, True, False, False])


def rows_of(teacher: Tensor) -> FeatureSet:
    label = teacher.argmax(1)
    forgotten = (teacher[:, FORGET] >= 0).any(1)
    return FeatureSet((torch.zeros(len(teacher), 1),), teacher, label, forgotten)


def masked(teacher: Tensor, logit: float) -> Tensor:
    return torch.where(FORGET, logit, teacher)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("only", [True, False])
def test_the_gradient_is_that_of_the_divergence(only: bool, constant: bool) -> None:
    _, _, rows = case()
    loss = MultiLabelKL(FORGET, 2.0, only)
    loss.constant = constant
    logits = torch.randn(len(rows), 4, requires_grad=True)
    value, dlogits = loss(logits.detach(), rows)
    want = loss.divergence(logits, rows)
    (expected,) = torch.autograd.grad(want, logits)
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-5)
    # the mean over the rows moves with each of them, which cancels out
    expected = expected * FORGET if only else expected
    assert torch.allclose(dlogits, expected, rtol=1e-3, atol=1e-5)


def test_the_masked_teacher_is_the_lowest_point() -> None:
    rows = rows_of(4 * torch.randn(64, 4))
    loss = MultiLabelKL(FORGET, 3.0)
    assert float(loss.divergence(masked(rows.teacher, -30.0), rows)) == pytest.approx(0, abs=1e-4)
    lower = [float(loss.divergence(masked(rows.teacher, z), rows)) for z in (0, -3, -6, -30)]
    assert lower == sorted(lower, reverse=True)
    moved = masked(rows.teacher, -30.0) + 2.0 * ~FORGET  # a softmax would not notice
    assert float(loss.divergence(moved, rows)) > 1


def test_forgotten_logits_that_still_rank_the_rows_cost() -> None:
    rows = rows_of(4 * torch.randn(64, 4))
    ranked = torch.where(FORGET, rows.teacher - 60, rows.teacher)
    loss = MultiLabelKL(FORGET, 3.0)
    loss.constant = True
    flat, same = loss.divergence(masked(rows.teacher, -60.0), rows), loss.divergence(ranked, rows)
    assert float(same) > float(flat) + 1


def test_leak_and_agreement() -> None:
    teacher = torch.tensor([[5.0, 5, -5, -5], [5, -5, -5, -5], [-5, -5, -5, -5], [-5, 5, -5, -5]])
    rows, loss = rows_of(teacher), MultiLabelKL(FORGET, 1.0)
    assert FORGET.tolist() == [False, True, False, False]
    assert loss.may_leak(rows).tolist() == [True, False, False, True]
    leaked, same = loss.answers(teacher, rows)
    assert leaked.tolist() == [True, False, False, True]
    assert same.tolist() == [1, 1, 1, 1]
    leaked, same = loss.answers(-teacher.abs(), rows)  # nothing is predicted
    assert not leaked.any()
    # a single class that is left out weighs as much as two that are rightly absent
    assert same.tolist() == [0.5, 0.5, 1, 1]
    tail = torch.nn.Identity()
    rows.features = (teacher - 10 * FORGET,)
    assert loss.score(tail, rows)[1:] == (0, 1, 0)
    rows.features = (teacher - 10 * FORGET * torch.tensor([1.0, 1, 1, 0])[:, None],)
    assert loss.score(tail, rows)[1] == 0.5  # of the rows in which the teacher sees one


def test_the_margin_follows_the_negative_logits() -> None:
    logits = -torch.arange(1.0, 101)[:, None]
    assert absence_margin(logits) == pytest.approx(95.05, abs=0.2)
    assert absence_margin(torch.cat([logits, 50 + logits.abs()]), 0.5) == pytest.approx(50.5)
    assert absence_margin(torch.ones(3, 1)) > 0


def test_the_differential_objective_is_refused() -> None:
    with pytest.raises(ArgumentError, match="objective: got 'differential' for a multi-label"):
        ObjectiveSettings("differential", multi_label=True)

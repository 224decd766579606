"""The two objectives, and the choice between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feature_case import FORGET, case
from torch.nn import functional as F

from zsu_fast import ArgumentError
from zsu_fast.training.losses import Differential, MaskedKL, ObjectiveSettings


def test_differential_is_a_mean_over_each_side() -> None:
    _, _, rows = case()
    logits = torch.randn(len(rows), 4, requires_grad=True)
    ce = F.cross_entropy(logits, rows.label, reduction="none")
    want = -0.7 * ce[rows.forgotten].mean() + 0.2 * ce[~rows.forgotten].mean()
    loss, dlogits = Differential(0.7, 0.2)(logits.detach(), rows)
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)
    assert torch.allclose(dlogits, torch.autograd.grad(want, logits)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("side", [True, False])
def test_differential_on_rows_of_one_side(side: bool) -> None:
    _, _, rows = case()
    rows = rows.select((rows.forgotten == side).nonzero()[:, 0])
    loss, grad = Differential()(torch.randn(len(rows), 4), rows)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (float(loss) < 0) == side


def test_differential_descends_on_retain_and_ascends_on_forget() -> None:
    _, _, rows = case()
    _, grad = Differential()(rows.teacher, rows)
    own = grad.gather(1, rows.label[:, None])[:, 0]
    assert (own[rows.forgotten] > 0).all()  # a step against the gradient lowers that logit
    assert (own[~rows.forgotten] < 0).all()


def test_masked_is_the_mean_divergence_with_the_margin() -> None:
    _, _, rows = case()
    logits = torch.randn(len(rows), 4, requires_grad=True)
    q = rows.teacher.masked_fill(FORGET, -torch.inf).softmax(1)
    shifted = (logits + 2.0 * FORGET).log_softmax(1)
    want = F.kl_div(shifted, q, reduction="batchmean")
    loss, dlogits = MaskedKL(FORGET, 2.0)(logits.detach(), rows)
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)
    assert torch.allclose(dlogits, torch.autograd.grad(want, logits)[0], rtol=1e-4, atol=1e-7)


def test_masked_is_lowest_where_forgotten_logits_are_low() -> None:
    _, _, rows = case()
    validation_loss = MaskedKL(FORGET, 3.0)
    drops = [
        validation_loss.divergence(rows.teacher - d * FORGET.float(), rows) for d in (0, 3, 9, 30)
    ]
    assert drops == sorted(drops, reverse=True)
    assert float(drops[-1]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("everywhere", [True, False])
def test_the_retained_logits_keep_their_values(everywhere: bool) -> None:
    _, _, rows = case()
    forget = FORGET.to(rows.teacher.device)
    logits = (rows.teacher + torch.randn(len(rows), 4)).requires_grad_(True)
    change = (logits - rows.teacher)[:, ~forget].square()
    if not everywhere:
        change = change * (1 - rows.teacher.softmax(1)[:, forget].sum(1, keepdim=True))
    retained = rows.teacher[:, ~forget]
    size = (retained - retained.mean(1, keepdim=True)).square().sum()
    plain = MaskedKL(forget, 2.0)
    want = plain.divergence(logits, rows) + 5 * change.sum() / size
    loss, dlogits = MaskedKL(forget, 2.0, keep=5.0, keep_all=everywhere)(logits.detach(), rows)
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)
    assert torch.allclose(dlogits, torch.autograd.grad(want, logits)[0], rtol=1e-4, atol=1e-6)
    shifted = rows.teacher + 10.0  # a softmax does not see it
    assert float(MaskedKL(forget, 2.0, keep=5.0)(shifted, rows)[0]) > 10 + float(
        plain(shifted, rows)[0]
    )


@pytest.mark.parametrize("keep", [0.0, 5.0])
def test_the_teacher_is_read_where_it_is(keep: float) -> None:
    """The same bits, without a tensor that holds the teacher's logits of the batch."""
    _, _, rows = case()
    index = torch.randperm(len(rows))[:50]
    loss = MaskedKL(FORGET, 2.0, keep=keep)
    logits = torch.randn(50, 4)
    copied, in_place = rows.select(index), rows.select(index, copy_teacher=False)
    assert in_place.teacher is rows.teacher
    for got, want in zip(loss(logits, in_place), loss(logits, copied), strict=True):
        assert torch.equal(got, want)
    assert torch.equal(loss.divergence(logits, in_place), loss.divergence(logits, copied))


def test_the_masked_objective_is_the_validation_loss() -> None:
    validation_loss = MaskedKL(FORGET, 1.0)
    assert ObjectiveSettings("masked").make(validation_loss) is validation_loss
    made = ObjectiveSettings("differential", (0.8, 0.2)).make(validation_loss)
    assert isinstance(made, Differential)
    assert (made.weight_forget, made.weight_retain) == (0.8, 0.2)


@pytest.mark.parametrize("name", ["MaskedKL", "", None, 3])
def test_refused_objectives(name: Any) -> None:
    with pytest.raises(ArgumentError, match=r"objective: got .* Pass 'masked' or 'differential'"):
        ObjectiveSettings(name)


@pytest.mark.parametrize("weights", [(), (1,), (1, 2, 3), (0, 1), (1, -1), "ab", None, 1.0,
                                     (float("nan"), 1), (1, float("inf"))])  # fmt: skip
def test_refused_weights(weights: Any) -> None:
    with pytest.raises(ArgumentError, match="weights: got"):
        ObjectiveSettings("masked", weights)

"""The loss of deep forgetting and its gradient, against the formula in plain autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from zsu_fast.training.deep.losses import DeepObjective, MultiLabelDeepObjective
from zsu_fast.training.deep.open_set import StrangerObjective
from zsu_fast.training.deep.settings import DeepSettings
from zsu_fast.training.deep.tail import TailOutputs
from zsu_fast.training.features import FeatureSet

CLASSES, ROWS, BATCH, MARGIN = 7, 90, 60, 2.0
FORGET = torch.tensor([False, True, False, False, True, False, False])
SETTINGS = DeepSettings(keep=3.0, constant=1.5, erase=2.5, ridge=3.0)


def all_rows() -> FeatureSet:
    draw = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(ROWS, CLASSES, generator=draw)
    label, scene = teacher.argmax(1), (torch.rand(ROWS, generator=draw) < 0.8).float()
    return FeatureSet((torch.zeros(ROWS, 1),), teacher, label, FORGET[label], scene=scene)


def a_batch(width: int) -> tuple[Tensor, TailOutputs]:
    """Which rows, and what a tail made of them; features that know something of the classes."""
    draw = torch.Generator().manual_seed(1)
    index = torch.randint(ROWS, (BATCH,), generator=draw)
    teacher = all_rows().teacher[index]
    logits = teacher + torch.randn(BATCH, CLASSES, generator=draw)
    features = 2 * torch.randn(BATCH, width, generator=draw)
    features = features + 0.3 * teacher @ torch.randn(CLASSES, width, generator=draw)
    return index, TailOutputs(logits.requires_grad_(), features.requires_grad_())


def centred(x: Tensor, scene: Tensor) -> Tensor:
    return scene * (x - (scene * x).sum(0) / scene.sum())


def common_terms(objective: DeepObjective, outputs: TailOutputs, rows: FeatureSet) -> Tensor:
    """The third and fourth term."""
    s, old, new = objective.settings, rows.teacher, outputs.logits
    scene = torch.ones(len(rows), 1) if rows.scene is None else rows.scene[:, None]
    total = torch.zeros(())
    if not s.multi_label:
        low, low_before = (
            centred(z[:, FORGET] - z[:, ~FORGET].mean(1, keepdim=True), scene) for z in (new, old)
        )
        total = total + s.constant * low.square().sum() / low_before.square().sum()
    probed = old[:, FORGET] - (0 if s.multi_label else old.mean(1, keepdim=True))
    target = centred(probed, scene)
    target = target / (target.square().sum(0) / scene.sum()).sqrt()
    x = centred(outputs.features, scene)
    gram = x @ x.T
    ridge = s.ridge * gram.trace() / x.shape[1] * torch.eye(len(x))
    fitted = gram @ torch.linalg.solve(gram + ridge, target)
    return total + s.erase * (target * fitted).sum() / target.square().sum()


def kept(objective: DeepObjective, change: Tensor, weight: Tensor) -> Tensor:
    """The second term."""
    return objective.settings.keep * (weight * change.square().mean(1)).mean() / objective.size


def plain_loss(objective: DeepObjective, outputs: TailOutputs, rows: FeatureSet) -> Tensor:
    """The loss of each objective, as its docstring states it."""
    old, new = rows.teacher, outputs.logits
    change = (new - old)[:, ~FORGET]
    weight = 1 - old.softmax(1)[:, FORGET].sum(1)
    if isinstance(objective, MultiLabelDeepObjective):
        divergence, weight = objective.divergence(new, rows), torch.ones(len(rows))
    elif isinstance(objective, StrangerObjective):
        divergence = objective.divergence(new, rows)
    else:
        change = change - change.mean(1, keepdim=True)
        want = old.masked_fill(FORGET, -torch.inf).log_softmax(1)
        got = (new + MARGIN * FORGET).log_softmax(1)
        divergence = (want.exp() * (want - got))[:, ~FORGET].sum(1).mean()
    return divergence + kept(objective, change, weight) + common_terms(objective, outputs, rows)


def objective_of(kind: type[DeepObjective], rows: FeatureSet, **changes: Any) -> DeepObjective:
    settings = replace(SETTINGS, multi_label=kind is MultiLabelDeepObjective, **changes)
    more = (1.0, 2.0) if kind is StrangerObjective else ()
    return kind(None, rows, FORGET, MARGIN, settings, *more)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [BATCH // 3, 2 * BATCH], ids=["narrow", "wide"])
@pytest.mark.parametrize("scenes", [True, False], ids=["some scenes", "all scenes"])
@pytest.mark.parametrize("kind", [DeepObjective, MultiLabelDeepObjective, StrangerObjective])
def test_loss_and_gradients_are_those_of_autograd(
    kind: type[DeepObjective], scenes: bool, width: int
) -> None:
    rows, (index, outputs) = all_rows(), a_batch(width)
    if not scenes:
        rows.scene = None
    objective = objective_of(kind, rows)
    loss, *got = objective.loss_and_gradients(
        outputs, rows.select(index, copy_teacher=objective.copies_teacher)
    )
    plain = plain_loss(objective, outputs, rows.select(index))
    want = torch.autograd.grad(plain, (outputs.logits, outputs.features))
    assert float(loss) == pytest.approx(plain.item(), rel=1e-4)
    for one, other in zip(got, want, strict=True):
        assert one is not None
        assert float((one - other).norm() / other.norm()) < 1e-3
        assert float(other.norm()) > 1e-3


def test_strangers_are_judged_by_rows_of_retained_identities() -> None:
    rows = all_rows()
    inverted = (rows.scene == 0) & ~rows.forgotten
    assert bool(inverted.any())
    stranger, usual = (objective_of(kind, rows) for kind in (StrangerObjective, DeepObjective))
    assert torch.equal(stranger.to_agree(rows), inverted)
    assert torch.equal(usual.to_agree(rows), (rows.scene > 0) & ~rows.forgotten)
    scenes = rows.select((rows.scene > 0).nonzero()[:, 0])
    assert torch.equal(stranger.to_agree(scenes), ~scenes.forgotten)


def test_the_retained_logits_weigh_the_same_in_each_set_of_rows() -> None:
    """What is stored of one set is not taken for another's."""
    rows, (index, outputs) = all_rows(), a_batch(10)
    objective = objective_of(DeepObjective, rows)
    first = objective.loss_and_gradients(outputs, rows.select(index, copy_teacher=False))
    others = replace(rows, teacher=rows.teacher.flip(0))
    objective.loss_and_gradients(outputs, others.select(index, copy_teacher=False))
    again = objective.loss_and_gradients(outputs, rows.select(index))
    torch.testing.assert_close(again, first)


def test_without_an_erasing_term_features_get_no_gradient() -> None:
    rows, (index, outputs) = all_rows(), a_batch(10)
    objective = objective_of(DeepObjective, rows, erase=0.0)
    assert objective.loss_and_gradients(outputs, rows.select(index))[2] is None


def test_features_without_any_spread_erase_nothing() -> None:
    rows, (index, _) = all_rows(), a_batch(10)
    objective = objective_of(DeepObjective, rows)
    for width in (10, 100):
        explained, gradient = objective.explained_variance(
            torch.ones(BATCH, width), rows.select(index)
        )
        assert float(explained) == pytest.approx(0, abs=1e-5)
        assert bool(gradient.isfinite().all())

"""The BatchNorm prior: it pulls features towards the statistics, and changes nothing when off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from limited import SMALL, synthesize_limited
from support import QUICK, TinyNet, assert_forgets, bits, tiny, untouched
from torch import Tensor, nn

from zsu_fast import ArgumentError, ClassImpressions, synthesize, unlearn
from zsu_fast.synthesis.batch_norm_prior import BatchNormStatistics

FIELDS = ("images", "labels", "confidence", "target", "steps", "hit")


def make(model: nn.Module | None = None, **options: Any) -> ClassImpressions:
    given = {"per_class": 8, "precision": "float32", "progress": False} | options
    return synthesize(model or tiny(), **given)


def same(a: ClassImpressions, b: ClassImpressions) -> bool:
    return all(bits(getattr(a, f)) == bits(getattr(b, f)) for f in FIELDS)


# --- off -------------------------------------------------------------------------------------


def test_off_is_off() -> None:
    assert same(make(), make(batch_norm=0.0))


def test_it_is_reproducible_and_changes_something() -> None:
    model = tiny()
    with untouched(model):
        first = make(model, batch_norm=0.01)
    assert same(first, make(batch_norm=0.01))
    assert not same(first, make())
    assert not same(first, make(batch_norm=0.01, seed=1))
    assert first.hit_rate > 0.9
    with untouched(model):
        result = unlearn(model, [1, 3], batch_norm=0.01, **QUICK)
    assert_forgets(result, [1, 3])


# --- BatchNorm statistics --------------------------------------------------------------------


def test_the_distance_is_that_of_the_batch() -> None:
    model = tiny()
    watched = BatchNormStatistics(model)
    images = torch.randn(6, 3, 8, 8)
    for _ in range(2):  # the last batch's alone
        watched(torch.randn(4, 3, 8, 8))
        assert torch.equal(watched(images), tiny()(images))
        features = tiny().conv(images).transpose(0, 1).flatten(1)
        want = (features.mean(1) - model.bn.running_mean).norm() + (
            features.var(1, unbiased=False) - model.bn.running_var
        ).norm()
        assert watched.distance().item() == pytest.approx(want.item(), rel=1e-5)


def test_the_distance_falls() -> None:
    def distance(made: ClassImpressions) -> float:
        watched = BatchNormStatistics(tiny())
        with torch.no_grad():
            watched(made.images)
        return float(watched.distance())

    options = {"confidence": None, "max_steps": 40}
    plain, pulled = (distance(make(batch_norm=w, **options)) for w in (0.0, 1.0))
    assert pulled < 0.8 * plain


def test_several_batches_and_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    distance = BatchNormStatistics.distance

    def spy(self: BatchNormStatistics) -> Tensor:
        taken.append(len(self._terms))
        return distance(self)

    monkeypatch.setattr(BatchNormStatistics, "distance", spy)
    settings = {"per_class": 8, "precision": "float32", "batch_norm": 0.01}
    assert len(synthesize_limited(SMALL, tiny(), **settings)) == 40
    assert set(taken) == {2}  # one layer, mean and variance, however many shards there are


def test_a_model_without_batchnorm() -> None:
    model = tiny()
    model.bn = nn.Identity()
    with untouched(model), pytest.raises(ArgumentError, match="batch_norm: given for a model with"):
        make(model, batch_norm=0.1)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-0.1, float("nan"), "much", True])
def test_refused_weights(value: Any) -> None:
    with pytest.raises(ArgumentError, match="batch_norm: got"):
        make(batch_norm=value)
    with pytest.raises(ArgumentError, match="batch_norm: got"):
        unlearn(tiny(), [1], batch_norm=value, **QUICK)


def test_points_that_are_no_images() -> None:
    with pytest.raises(ArgumentError, match=r"batch_norm: got 0\.1 for points of shape .* images"):
        unlearn(TinyNet().eval(), [1], batch_norm=0.1, **QUICK | {"space": "tail-input"})

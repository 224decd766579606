"""Priors on images: each changes what it should, and none of them anything when it is off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import QUICK, TinyNet, assert_forgets, bits, tiny, untouched
from torch import Tensor, nn

from zsu_fast import ArgumentError, ClassImpressions, ops, synthesize, unlearn
from zsu_fast.priors import Observed, total_variation, total_variation_gradient

FIELDS = ("images", "labels", "confidence", "target", "steps", "hit")


def make(model: nn.Module | None = None, **options: Any) -> ClassImpressions:
    given = {"per_class": 8, "precision": "float32", "progress": False} | options
    return synthesize(model or tiny(), **given)


def same(a: ClassImpressions, b: ClassImpressions) -> bool:
    return all(bits(getattr(a, f)) == bits(getattr(b, f)) for f in FIELDS)


# --- off -------------------------------------------------------------------------------------


def test_off_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make()
    seen: list[Any] = []
    step = ops.ascent_step_

    def spy(*args: Any, **named: Any) -> None:
        seen.append(named)
        step(*args, **named)

    monkeypatch.setattr(ops, "ascent_step_", spy)
    monkeypatch.setattr("zsu_fast.ascent.total_variation_gradient", None)  # not to be called
    monkeypatch.setattr("zsu_fast.priors.with_statistics", None)
    assert same(plain, make(jitter=0.0, total_variation=0.0, batch_norm=0.0))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("prior", ["jitter", "total_variation", "batch_norm"])
def test_each_is_reproducible_and_changes_something(prior: str) -> None:
    model = tiny()
    with untouched(model):
        first = make(model, **{prior: 0.01})
    assert same(first, make(**{prior: 0.01}))
    assert not same(first, make())
    assert not same(first, make(**{prior: 0.01}, seed=1))
    assert first.hit_rate > 0.9
    with untouched(model):
        result = unlearn(model, [1, 3], **{prior: 0.01}, **QUICK)
    assert_forgets(result, [1, 3])


# --- total variation -------------------------------------------------------------------------


def test_the_gradient_is_that_of_autograd() -> None:
    x = torch.randn(3, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(total_variation(x).sum(), x)
    assert torch.equal(total_variation_gradient(x.detach()), want)
    assert float(total_variation(torch.tensor([[[[0.0, 2.0], [5.0, 1.0]]]]))) == 2 + 4 + 5 + 1


def test_the_gradient_keeps_the_layout() -> None:
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert total_variation_gradient(x).stride() == x.stride()


def test_total_variation_falls() -> None:
    values = [
        float(total_variation(make(total_variation=w, confidence=None, max_steps=40).images).mean())
        for w in (0.0, 0.02, 0.2)
    ]
    assert values[1] < 0.9 * values[0]
    assert values[2] < 0.5 * values[0]


# --- BatchNorm statistics --------------------------------------------------------------------


def test_the_distance_is_that_of_the_batch() -> None:
    model = tiny()
    watched = Observed(model)
    images = torch.randn(6, 3, 8, 8)
    for _ in range(2):  # the last batch's alone
        watched(torch.randn(4, 3, 8, 8))
        assert torch.equal(watched(images), tiny()(images))
        features = tiny().conv(images).transpose(0, 1).flatten(1)
        want = (features.mean(1) - model.bn.running_mean).norm() + (
            features.var(1, unbiased=False) - model.bn.running_var
        ).norm()
        assert float(watched.distance()) == pytest.approx(float(want), rel=1e-5)


def test_the_distance_falls() -> None:
    def distance(made: ClassImpressions) -> float:
        watched = Observed(tiny())
        with torch.no_grad():
            watched(made.images)
        return float(watched.distance())

    options = {"confidence": None, "max_steps": 40}
    plain, pulled = (distance(make(batch_norm=w, **options)) for w in (0.0, 1.0))
    assert pulled < 0.8 * plain


def test_several_batches_and_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsu_fast.impressions._BATCH_VALUES", 1)
    monkeypatch.setattr("zsu_fast.impressions._BATCHES_A_SHARD", 1)
    taken: list[int] = []
    distance = Observed.distance

    def spy(self: Observed) -> Tensor:
        taken.append(len(self._terms))
        return distance(self)

    monkeypatch.setattr(Observed, "distance", spy)
    assert len(make(batch_norm=0.01)) == 40
    assert set(taken) == {2}  # one layer, mean and variance, however many shards were made


def test_a_model_without_batchnorm() -> None:
    model = tiny()
    model.bn = nn.Identity()
    with untouched(model), pytest.raises(ArgumentError, match="batch_norm: given for a model with"):
        make(model, batch_norm=0.1)


# --- jitter ----------------------------------------------------------------------------------


def test_jitter_is_in_units_of_the_pixel_range() -> None:
    options: dict[str, Any] = {"max_steps": 2, "restarts": 0, "confidence": None}
    plain, shaken = make(**options), make(jitter=0.05, **options)
    inside = (shaken.images > shaken.spec.low.view(3, 1, 1)) & (
        shaken.images < shaken.spec.high.view(3, 1, 1)
    )
    span = float((plain.spec.high - plain.spec.low).mean())
    moved = (shaken.images - plain.images)[inside].abs() / span
    assert 0.01 < float(moved.mean()) < 0.1
    assert float(moved.max()) < 3 * 0.05


def test_shards_are_not_shaken_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsu_fast.impressions._BATCH_VALUES", 1)
    monkeypatch.setattr("zsu_fast.impressions._BATCHES_A_SHARD", 1)
    seeds: list[int] = []
    step = ops.ascent_step_

    def spy(*args: Any, **named: Any) -> None:
        seeds.append(int(named["seed"]))
        step(*args, **named)

    monkeypatch.setattr(ops, "ascent_step_", spy)
    make(jitter=0.01)
    assert len(set(seeds)) == 3


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["jitter", "total_variation", "batch_norm"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), "much", True])
def test_refused_weights(prior: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{prior}: got"):
        make(**{prior: value})
    with pytest.raises(ArgumentError, match=f"{prior}: got"):
        unlearn(tiny(), [1], **{prior: value}, **QUICK)


@pytest.mark.parametrize("prior", ["total_variation", "batch_norm"])
def test_points_that_are_no_images(prior: str) -> None:
    with pytest.raises(ArgumentError, match=rf"{prior}: got 0\.1 for points of shape .* images"):
        unlearn(TinyNet().eval(), [1], space="tail-input", **{prior: 0.1}, **QUICK)

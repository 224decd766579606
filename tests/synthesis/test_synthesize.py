"""Class impressions: valid images, one for each class asked for; errors, progress."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import SPEC, bits, tiny, untouched
from torch import nn

from zsu_fast import ArgumentError, ClassImpressions, Event, ModelError, synthesize
from zsu_fast.models import zoo
from zsu_fast.models.wrapper import working_copy
from zsu_fast.synthesis.ascent_settings import BatchLimits
from zsu_fast.synthesis.space import SearchSpace, input_space
from zsu_fast.synthesis.synthesize import batch_rows

FIELDS = ("images", "labels", "confidence", "target", "steps", "hit")


def make(model: nn.Module | None = None, classes: Any = None, **options: Any) -> ClassImpressions:
    return synthesize(model or tiny(), classes, progress=False, **({"per_class": 8} | options))


def test_shapes_dtypes_and_order() -> None:
    made = make(classes=[3, 1], per_class=4)
    assert made.labels.tolist() == [1] * 4 + [3] * 4
    assert len(made) == 8
    assert made.images.shape == (8, 3, 8, 8)
    assert (made.images.dtype, made.labels.dtype) == (torch.float32, torch.int64)
    assert (made.confidence.dtype, made.target.dtype) == (torch.float32, torch.float32)
    assert (made.steps.dtype, made.hit.dtype) == (torch.int32, torch.bool)
    assert not made.images.requires_grad
    assert made.spec.shape == (3, 8, 8)


@pytest.mark.parametrize("step_size", [0.005, 0.5])
def test_pixels_are_those_of_real_images(step_size: float) -> None:
    made = make(step_size=step_size, confidence=None, max_steps=30)
    low, high = SPEC.low.view(1, 3, 1, 1), SPEC.high.view(1, 3, 1, 1)
    assert (made.images >= low).all()
    assert (made.images <= high).all()
    if step_size == 0.5:  # so that the clamp is at work
        assert (made.images == low).any()
        assert (made.images == high).any()


def test_given_mean_and_std_move_the_valid_range() -> None:
    made = make(mean=(0.0,) * 3, std=(1.0,) * 3)
    assert 0 <= float(made.images.min()) < float(made.images.max()) <= 1


def test_zoo_impressions_hit_their_targets() -> None:
    model = zoo.load("lenet5")
    with untouched(model):
        made = make(model, per_class=4)
    assert made.hit_rate >= 0.95
    assert (model(made.images).argmax(1) == made.labels)[made.hit].all()
    assert all(made.hit_rate_of(c) == made.hit[4 * c : 4 * c + 4].float().mean() for c in range(10))


def test_same_seed_same_bits() -> None:
    first, second, other = make(seed=1), make(seed=1), make(seed=2)
    assert all(bits(getattr(first, f)) == bits(getattr(second, f)) for f in FIELDS)
    assert not (first.images == other.images).flatten(1).all(1).any()
    assert not (first.target == other.target).any()


def test_the_model_is_not_touched() -> None:
    model = tiny().train().half()
    model.fc1.requires_grad_(False)
    with untouched(model):
        made = make(model, per_class=4)
    assert made.images.dtype == torch.float32
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("classes", [[], [5], [-1], [True], [0.5], "0", [1, 1]])
def test_refused_classes(classes: Any) -> None:
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError, match=r"^classes: got .* Pass distinct"):
        make(model, classes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("per_class", 0), ("per_class", 1.5), ("per_class", True), ("max_steps", 0),
     ("restarts", -1), ("step_size", 0), ("step_size", "x"), ("beta", -1), ("seed", -1),
     ("seed", 0.5), ("confidence", (0.9, 0.1)), ("confidence", (0.5, float("nan"))),
     ("confidence", "ab"), ("input_shape", (1,)), ("mean", "x"), ("std", -1), ("device", "x")],
)  # fmt: skip
def test_refused_options(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        make(**{name: value})
    assert caught.value.argument == name
    assert repr(value) in str(caught.value)


def test_nan_weights_are_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.fc2.bias[0] = float("nan")
    with untouched(model), pytest.raises(ModelError, match=r"fc2\.bias holds 1 NaN"):
        make(model)


def test_the_callback_stops_and_keeps_what_is_done() -> None:
    events: list[Event] = []

    def callback(event: Event) -> bool:
        events.append(event)
        return event.done >= 10

    made = make(callback=callback)
    assert 10 <= len(made) < 40
    assert made.hit.all()
    assert len(made) == events[-1].done
    assert {e.stage for e in events} == {"synthesise"}
    assert {e.total for e in events} == {40}
    assert [e.done for e in events] == sorted(e.done for e in events)


def test_the_callback_may_stop_at_once() -> None:
    made = make(callback=lambda _: True, confidence=(0.98, 0.99))
    assert len(made) == int(made.hit.sum())
    assert made.hit_rate in (0.0, 1.0)


def test_no_warning_on_a_good_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(per_class=4)


# --- rows of a working batch -------------------------------------------------------------------


def space_of_64_classes() -> SearchSpace:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 64))
    return input_space(working_copy(model, torch.device("cpu")), SPEC, "float32")


def test_few_rows_ascend_at_once_where_classes_are_many() -> None:
    space = space_of_64_classes()
    wide = batch_rows(space)[1]
    assert wide > 20
    assert batch_rows(space, BatchLimits(logits=20 * 64)) == (80, 20)


def test_few_rows_ascend_at_once_where_they_fill_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of_64_classes()
    weights = sum(p.nbytes for p in space.exact.parameters())
    for row, cache, rows in (
        (weights // 12, 30 * (weights // 12), 30),
        (weights // 12, 0, 12),  # no less than the weights that are read for them
        (weights, 0, 8),
    ):
        monkeypatch.setattr("zsu_fast.runtime.memory.bytes_per_row", lambda *_, row=row: row)
        assert batch_rows(space, BatchLimits(cache_bytes=cache))[1] == rows

"""Class impressions: valid images that the model takes for their class, as sure as asked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import SPEC, bits, tiny, untouched
from torch import Tensor, nn

from zsu_fast import (
    ArgumentError,
    CheckpointError,
    ClassImpressions,
    Event,
    ModelError,
    OutputError,
    ops,
    synthesize,
)
from zsu_fast.models import zoo
from zsu_fast.synthesis.ascent import _mix

FIELDS = ("images", "labels", "confidence", "target", "steps", "hit")


def make(model: nn.Module | None = None, classes: Any = None, **options: Any) -> ClassImpressions:
    return synthesize(model or tiny(), classes, progress=False, **({"per_class": 8} | options))


def confidence_of(model: nn.Module, made: ClassImpressions) -> Tensor:
    with torch.no_grad():
        return model(made.images).softmax(1).gather(1, made.labels[:, None])[:, 0]


def unreachable(label: int = 4) -> nn.Module:
    """A model that never answers one class."""
    model = tiny()
    with torch.no_grad():
        model.fc2.weight[label] = 0
        model.fc2.bias[label] = -1e4
    return model


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


def test_each_stops_at_a_confidence_of_its_own() -> None:
    model = tiny()
    made = make(model, per_class=16, confidence=(0.6, 0.9), step_size=0.002, precision="float32")
    assert made.hit_rate == 1
    assert ((made.target >= 0.6) & (made.target <= 0.9)).all()
    assert len(made.target.unique()) > 70
    assert torch.allclose(confidence_of(model, made), made.confidence, atol=1e-4)
    over = made.confidence - made.target
    assert (over >= 0).all()
    moved = made.steps > 0  # those that start above their target can't stop at it
    assert (over[moved] < 0.15).all()
    assert float(over[moved].mean()) < 0.05


def test_in_bfloat16_the_stop_is_as_near_as_its_rounding() -> None:
    made = make(tiny(), per_class=16, confidence=(0.6, 0.9), step_size=0.002, precision="bfloat16")
    assert made.hit_rate == 1
    over = made.confidence - made.target  # the confidence is what the float32 model gives
    assert float(over.min()) > -0.02
    assert torch.allclose(confidence_of(tiny(), made), made.confidence, atol=1e-4)


def test_zoo_impressions_hit_their_targets() -> None:
    model = zoo.load("lenet5")
    with untouched(model):
        made = make(model, per_class=4)
    assert made.hit_rate >= 0.95
    assert (model(made.images).argmax(1) == made.labels)[made.hit].all()
    assert all(made.hit_rate_of(c) == made.hit[4 * c : 4 * c + 4].float().mean() for c in range(10))


def test_without_a_confidence_all_steps_are_taken() -> None:
    made = make(confidence=None, max_steps=25, restarts=0)
    assert (made.steps == 25).all()
    assert (made.target == 1).all()
    assert float(made.confidence.mean()) > 0.99
    assert made.hit_rate == 1


def test_the_squared_norm_is_held_down_by_beta() -> None:
    norms = [
        float(make(beta=beta, confidence=None, max_steps=60).images.square().sum())
        for beta in (0.0, 1e-1)
    ]
    assert norms[1] < 0.7 * norms[0]


# --- what one impression depends on ----------------------------------------------------------


def test_an_impression_depends_on_seed_class_and_number_alone() -> None:
    few, many = make(per_class=4), make(per_class=9)
    some = make(classes=[4, 2], per_class=9)
    for label in range(5):
        for number in range(4):
            a, b = 4 * label + number, 9 * label + number
            assert few.target[a] == many.target[b]
            assert abs(int(few.steps[a]) - int(many.steps[b])) <= 1  # rounding differs by width
            assert torch.allclose(few.images[a], many.images[b], atol=0.05)
    assert torch.equal(some.target, torch.cat([many.target[18:27], many.target[36:45]]))
    assert torch.allclose(some.images[:9], many.images[18:27], atol=0.05)


def test_a_narrow_working_batch_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = make(per_class=8)
    monkeypatch.setattr("zsu_fast.synthesis.synthesize._BATCH_VALUES", 1)  # 16 rows at a time
    narrow = make(per_class=8)
    assert torch.equal(wide.target, narrow.target)
    assert torch.equal(wide.labels, narrow.labels)
    assert torch.equal(wide.hit, narrow.hit)
    assert ((wide.steps - narrow.steps).abs() <= 1).all()
    assert torch.allclose(wide.images, narrow.images, atol=0.05)


def test_same_seed_same_bits() -> None:
    first, second, other = make(seed=1), make(seed=1), make(seed=2)
    assert all(bits(getattr(first, f)) == bits(getattr(second, f)) for f in FIELDS)
    assert not (first.images == other.images).flatten(1).all(1).any()
    assert not (first.target == other.target).any()


def test_no_two_impressions_start_alike() -> None:
    made = make(per_class=16, max_steps=1, restarts=0)
    flat = made.images.flatten(1)
    assert float(torch.cdist(flat, flat).add(torch.eye(80) * 1e6).min()) > 0.5
    assert len({_mix(s, c, n, a) for s in range(4) for c in range(9) for n in range(9)
                for a in range(3)}) == 4 * 9 * 9 * 3  # fmt: skip


# --- rows leave the batch, restarts, cap -----------------------------------------------------


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    step = ops.ascent_step_

    def spy(x: Tensor, *rest: Any) -> None:
        widths.append(len(x))
        step(x, *rest)

    monkeypatch.setattr(ops, "ascent_step_", spy)
    made = make(per_class=16)
    assert widths[0] == 80
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] <= 8
    full = 80 * len(widths)
    assert sum(widths) < 0.8 * full
    assert sum(widths) >= int(made.steps.sum())


def test_an_unreachable_class_ends_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    step = ops.ascent_step_

    def spy(*args: Any) -> None:
        calls.append(1)
        step(*args)

    monkeypatch.setattr(ops, "ascent_step_", spy)
    made = make(unreachable(), per_class=4, max_steps=20, restarts=2)
    gone = made.labels == 4
    assert not made.hit[gone].any()
    assert made.hit[~gone].all()
    assert made.hit_rate == pytest.approx(0.8)
    assert made.hit_rate_of(4) == 0
    assert made.hit_rate_of(0) == 1
    assert (made.steps[gone] == 3 * 20).all()  # the first attempt and two restarts
    assert len(calls) <= 3 * 21 + 3
    assert made.images.isfinite().all()
    assert (made.confidence[gone] < 1e-6).all()


def test_a_restart_starts_elsewhere() -> None:
    kept = [make(unreachable(), [4], per_class=4, max_steps=1, restarts=r) for r in (0, 1, 2)]
    for a, b in ((0, 1), (1, 2)):
        assert not torch.equal(kept[a].images, kept[b].images)
        assert not (kept[a].target == kept[b].target).any()
        assert len(kept[b].target.unique()) == 4


def test_a_restart_can_save_a_row() -> None:
    model = tiny()
    options = {"per_class": 16, "max_steps": 20, "confidence": (0.5, 0.99), "step_size": 0.002}
    rates = [make(model, restarts=r, **options).hit_rate for r in (0, 4)]
    assert 0 < rates[0] < rates[1]


def test_gradients_that_are_not_finite_end_a_row() -> None:
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(_ctx: Any, grad: Tensor) -> Tensor:
            return torch.where(grad != 0, torch.inf, 0.0)

    class Broken(nn.Module):
        """The logit of class 1 has no finite gradient anywhere."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return torch.cat([y[:, :1], Steep.apply(y[:, 1:2]), y[:, 2:]], 1)

    made = make(Broken().eval(), per_class=4, input_shape=(3, 8, 8), max_steps=30)
    assert not made.hit[made.labels == 1].any()
    assert made.hit[made.labels != 1].all()
    assert made.images.isfinite().all()


# --- the caller's model, errors, progress ----------------------------------------------------


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


# --- files -----------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    made = make(per_class=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    path = tmp_path / "made.safetensors"
    made.save(path)
    loaded = ClassImpressions.load(path)
    assert all(bits(getattr(made, f)) == bits(getattr(loaded, f)) for f in FIELDS)
    assert loaded.spec == made.spec
    with pytest.raises(OutputError, match="exists"):
        made.save(path)
    made.save(path, force=True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError):
        ClassImpressions.load(path)
    save_file({"images": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"holds no class impressions.*synthesize"):
        ClassImpressions.load(path)
    made = make(per_class=4)
    made.save(path, force=True)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="no intact safetensors"):
        ClassImpressions.load(path)

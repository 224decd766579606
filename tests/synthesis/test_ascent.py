"""Gradient ascent: each point stops at its own confidence, leaves the batch, and may restart."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from limited import synthesize_limited
from support import tiny
from torch import Tensor, nn

from zsu_fast import ClassImpressions, ops, synthesize
from zsu_fast.runtime import cuda_graph
from zsu_fast.runtime.cuda_graph import Loop
from zsu_fast.synthesis.ascent import hash_ints
from zsu_fast.synthesis.ascent_settings import BatchLimits
from zsu_fast.synthesis.step_graph import STEPS_PER_GRAPH, StepGraph

FIELDS = ("images", "labels", "confidence", "target", "steps", "hit")


def make(model: nn.Module | None = None, classes: Any = None, **options: Any) -> ClassImpressions:
    return synthesize(model or tiny(), classes, progress=False, **({"per_class": 8} | options))


def unreachable(label: int = 4) -> nn.Module:
    """A model that never answers one class."""
    model = tiny()
    with torch.no_grad():
        model.fc2.weight[label] = 0
        model.fc2.bias[label] = -1e4
    return model


def confidence_of(model: nn.Module, made: ClassImpressions) -> Tensor:
    with torch.no_grad():
        return model(made.images).softmax(1).gather(1, made.labels[:, None])[:, 0]


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


def test_a_narrow_working_batch_gives_the_same() -> None:
    wide = make(per_class=8)
    limits = BatchLimits(values=1)  # 16 rows at a time
    narrow = synthesize_limited(limits, tiny(), per_class=8)
    assert torch.equal(wide.target, narrow.target)
    assert torch.equal(wide.labels, narrow.labels)
    assert torch.equal(wide.hit, narrow.hit)
    assert ((wide.steps - narrow.steps).abs() <= 1).all()
    assert torch.allclose(wide.images, narrow.images, atol=0.05)


def test_no_two_impressions_start_alike() -> None:
    made = make(per_class=16, max_steps=1, restarts=0)
    flat = made.images.flatten(1)
    assert float(torch.cdist(flat, flat).add(torch.eye(80) * 1e6).min()) > 0.5
    assert len({hash_ints(s, c, n, a) for s in range(4) for c in range(9) for n in range(9)
                for a in range(3)}) == 4 * 9 * 9 * 3  # fmt: skip


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
    unreached = made.labels == 4
    assert not made.hit[unreached].any()
    assert made.hit[~unreached].all()
    assert made.hit_rate == pytest.approx(0.8)
    assert made.hit_rate_of(4) == 0
    assert made.hit_rate_of(0) == 1
    assert (made.steps[unreached] == 3 * 20).all()  # the first attempt and two restarts
    assert len(calls) <= 3 * 21 + 3
    assert made.images.isfinite().all()
    assert (made.confidence[unreached] < 1e-6).all()


def test_a_restart_starts_elsewhere() -> None:
    runs = [make(unreachable(), [4], per_class=4, max_steps=1, restarts=r) for r in (0, 1, 2)]
    for a, b in ((0, 1), (1, 2)):
        assert not torch.equal(runs[a].images, runs[b].images)
        assert not (runs[a].target == runs[b].target).any()
        assert len(runs[b].target.unique()) == 4


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


# --- captured steps --------------------------------------------------------------------------


def test_steps_are_captured_once_per_batch_and_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the CUDA graph, which runs what was captured."""
    captures = 0

    class Graph:
        def __init__(self, run: Callable[[], None]) -> None:
            nonlocal captures
            captures += 1
            self.replay = run

    monkeypatch.setattr(cuda_graph, "warm_up", lambda run, _device: run())
    monkeypatch.setattr(cuda_graph, "capture", Graph)
    tensors = lambda: [torch.zeros(1)]  # noqa: E731
    one, other = (
        SimpleNamespace(penalises=False, steps=0, tensors=tensors, index=[0]) for _ in range(2)
    )

    def step(batch: Any) -> None:
        batch.steps += 1

    graph = StepGraph("auto", torch.device("cuda"))
    expected = 3  # to warm up
    for _ in range(3):
        graph.run(step, one)
        expected += STEPS_PER_GRAPH
    assert (captures, one.steps) == (1, expected)
    one.penalises = True
    graph.run(step, one)
    assert (captures, one.steps) == (2, expected + 3 + STEPS_PER_GRAPH)
    graph.run(step, other)
    assert (captures, other.steps) == (3, 3 + STEPS_PER_GRAPH)


@pytest.mark.parametrize(("loop", "device", "steps"), [("auto", "cpu", 1), ("eager", "cuda", 4)])
def test_steps_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, loop: Loop, device: str, steps: int
) -> None:
    monkeypatch.setattr(cuda_graph, "capture", lambda _run: pytest.fail("captured"))
    batch: Any = SimpleNamespace(penalises=False, steps=0)

    def step(batch: Any) -> None:
        batch.steps += 1

    StepGraph(loop, torch.device(device)).run(step, batch)
    assert batch.steps == steps

"""Training the tail: when it stops, what it keeps, and that a bad step is never the last."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from linear_case import FORGET, LinearCase, Scripted
from torch import Tensor

from zsu_fast import ArgumentError, Event
from zsu_fast.runtime.progress import Reporter
from zsu_fast.training.features import FeatureSet
from zsu_fast.training.losses import Differential
from zsu_fast.training.trainer import LoopSettings, train_tail


def test_it_learns_and_leaves_the_best_state() -> None:
    case = LinearCase()
    fit = case.train()
    assert case.forgets()
    first, best = fit.history[0], fit.best
    assert first.step == 0
    assert math.isnan(first.loss)
    assert first.leak > 0.2
    assert best.divergence == min(c.divergence for c in fit.history) < 0.1 * first.divergence
    assert case.divergence() == pytest.approx(best.divergence, rel=1e-5)
    assert best.leak == 0
    assert best.agreement > 0.95
    assert fit.learning_rate == best.learning_rate > 0
    assert [c.step for c in fit.history] == sorted({c.step for c in fit.history})


def test_early_stop_goes_back_to_the_best_state() -> None:
    """It learns for 50 steps, then unlearns: the loop must notice and go back."""
    case = LinearCase()

    def script(call: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        loss = case.validation_loss.divergence(logits, rows)
        return loss if call <= 50 else -loss

    fit = case.train(Scripted(script), learning_rate=0.05, steps=400)
    assert "no gain on held-out impressions" in fit.stopped
    assert "back to the best state" in fit.stopped
    assert 45 <= fit.best.step <= 60
    assert fit.history[-1].step < 400
    assert fit.history[-1].divergence > fit.best.divergence
    assert case.divergence() == pytest.approx(fit.best.divergence, rel=1e-5)
    assert case.forgets()


def test_without_early_stop_the_last_state_is_kept() -> None:
    case = LinearCase()

    def script(call: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        loss = case.validation_loss.divergence(logits, rows)
        return loss if call <= 50 else -loss

    fit = case.train(Scripted(script), learning_rate=0.05, early_stop=False)
    assert fit.stopped == "all 200 steps taken"
    assert fit.best is fit.history[-1]
    assert fit.best.step == 200
    assert case.divergence() == pytest.approx(fit.best.divergence, rel=1e-5)
    assert fit.best.divergence > min(c.divergence for c in fit.history)


def test_the_rate_stays_fixed_without_early_stop() -> None:
    moves: list[list[float]] = []
    for early in (False, True):
        case = LinearCase()
        seen: list[Tensor] = []

        def script(_: int, logits: Tensor, __: FeatureSet, seen: list[Tensor] = seen,
                   case: LinearCase = case) -> Tensor:  # fmt: skip
            seen.append(case.tail.bias.detach().clone())
            return logits[:, 0].mean()  # Adam moves bias 0 by the rate each step

        case.train(Scripted(script), learning_rate=0.01, early_stop=early, steps=40, batch=140)
        moves.append([float(a[0] - b[0]) for a, b in pairwise(seen)])
    fixed, falling = moves
    assert fixed == pytest.approx([0.01] * 39, rel=1e-2)
    assert len(falling) > 5
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.95 * falling[0]


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("when", [1, 30])
def test_a_loss_that_is_not_finite_rolls_back(early_stop: bool, when: int) -> None:
    case = LinearCase()

    def script(call: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        loss = case.validation_loss.divergence(logits, rows)
        return loss * math.nan if call >= when else loss

    fit = case.train(Scripted(script), learning_rate=0.05, early_stop=early_stop)
    assert "non-finite values at step" in fit.stopped
    assert all(p.isfinite().all() for p in case.tail.parameters())
    assert case.divergence() == pytest.approx(fit.best.divergence, rel=1e-5)
    if when == 1:
        assert case.unchanged()
        assert fit.best is fit.history[0]
        assert "no state was better than the original" in fit.stopped
        assert fit.learning_rate == 0
    else:
        assert 0 < fit.best.step < 30
        assert not case.unchanged()


def test_infinite_logits_are_refused_even_where_the_divergence_is_finite() -> None:
    """A forgotten logit at -inf is the mask itself by its divergence, and no finite model."""
    case = LinearCase()

    def script(call: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        if call == 30:
            case.tail.bias.data[1] = -torch.inf
        return case.validation_loss.divergence(logits, rows)

    fit = case.train(Scripted(script), learning_rate=0.05)
    assert "non-finite values at step 30" in fit.stopped
    assert fit.best.step < 30
    assert case.tail.bias.isfinite().all()


def test_a_rate_that_blows_up_is_lowered() -> None:
    """Infinite as soon as a weight has moved far: only the smallest rate stays near enough."""
    case = LinearCase()

    def script(_: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        moved = (case.tail.weight.detach() - case.start[0]).abs().max()
        blown = torch.where(moved > 3.0, torch.inf, 1.0)
        return case.validation_loss.divergence(logits, rows) * blown

    fit = case.train(Scripted(script, rate=4.0), steps=120)
    rates = {c.attempt: c.learning_rate for c in fit.history[1:]}
    assert rates[0] == 4.0
    assert rates[1] < 4.0  # lowered at once, not raised first
    assert fit.learning_rate == min(rates.values()) < 4.0
    assert any(math.isnan(c.divergence) for c in fit.history)
    assert all(p.isfinite().all() for p in case.tail.parameters())
    assert case.forgets()


def test_the_rate_is_raised_where_it_is_too_low() -> None:
    case = LinearCase()
    fit = case.train(Scripted(lambda _, x, r: case.validation_loss.divergence(x, r), rate=0.01),
                        steps=60)  # fmt: skip
    rates = [c.learning_rate for c in fit.history if c.attempt == 1]
    assert rates
    assert rates[0] == pytest.approx(0.03)


def test_each_attempt_starts_from_the_original() -> None:
    case = LinearCase()
    starts: dict[int, Tensor] = {}

    def script(call: int, logits: Tensor, _: FeatureSet) -> Tensor:
        if call % 5 == 1:
            starts[call] = case.tail.weight.detach().clone()
        return logits.sum() * 0.0

    fit = case.train(Scripted(script, rate=0.1), steps=5)
    assert fit.history[-1].attempt == 3
    assert len(starts) == 4
    assert all(torch.equal(w, case.start[0]) for w in starts.values())


def test_a_given_rate_is_the_only_one() -> None:
    case = LinearCase()
    fit = case.train(learning_rate=1e-6, steps=6)
    assert {c.learning_rate for c in fit.history[1:]} == {1e-6}
    assert fit.history[-1].step == 6


def test_an_unbounded_objective_does_not_run_away() -> None:
    case = LinearCase()
    fit = case.train(Differential(), learning_rate=0.5, steps=400)
    assert all(p.isfinite().all() for p in case.tail.parameters())
    assert case.divergence() <= fit.history[0].divergence
    assert case.divergence() == pytest.approx(fit.best.divergence, rel=1e-4)


def test_the_callback_ends_it_with_the_best_state() -> None:
    case = LinearCase()
    events: list[Event] = []

    def callback(event: Event) -> bool:
        events.append(event)
        return len(events) == 12

    fit = case.train(callback=callback, learning_rate=0.05)
    assert len(events) == 12
    assert "callback asked to stop in fit" in fit.stopped
    assert len(fit.history) == 13
    assert fit.best.divergence == min(c.divergence for c in fit.history)
    assert case.divergence() == pytest.approx(fit.best.divergence, rel=1e-5)
    assert fit.learning_rate == 0.05
    assert set(events[0].metrics) == {"divergence", "leak", "agreement"}
    assert events[0].stage == "fit"
    assert events[0].total == 200


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 37])
def test_an_exception_leaves_a_state_that_was_checked(
    error: type[BaseException], call: int
) -> None:
    case = LinearCase()

    def script(at: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        if at == call:
            raise error("now")
        return case.validation_loss.divergence(logits, rows)

    with pytest.raises(error, match="now"):
        case.train(Scripted(script), learning_rate=0.05)
    assert case.unchanged()


def test_only_the_given_parameters_move() -> None:
    case = LinearCase()
    task = case.task()
    task.parameters = [case.tail.bias]
    train_tail(task, LoopSettings(20, 64), Reporter(False))
    assert torch.equal(case.tail.weight, case.start[0])
    assert not torch.equal(case.tail.bias, case.start[1])


def test_every_row_is_used_before_one_comes_again() -> None:
    case = LinearCase()
    seen: list[int] = []
    case.train_rows.teacher = torch.arange(140.0)[:, None].expand(140, 4)

    def script(_: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        seen.extend(rows.teacher[:, 0].int().tolist())
        return logits.sum() * 0.0

    case.train(Scripted(script), learning_rate=0.1, steps=14, batch=35, early_stop=False)
    assert len(seen) == 14 * 35
    for at in range(0, 420, 140):
        assert sorted(seen[at : at + 140]) == list(range(140))
    assert seen[:140] != seen[140:280]


def test_a_batch_larger_than_the_rows() -> None:
    case = LinearCase()
    case.train(batch=10_000, steps=80, learning_rate=0.1)
    assert case.forgets()


def test_validation_measures_what_it_says() -> None:
    case = LinearCase()
    fit = case.train(steps=1)
    first = fit.history[0]
    answer = case.validation_rows.teacher.argmax(1)
    assert first.leak == pytest.approx(float(FORGET[answer].float().mean()))
    assert first.agreement == 1.0  # the original agrees with itself where nothing is masked
    assert first.divergence == pytest.approx(
        float(case.validation_loss.divergence(case.validation_rows.teacher, case.validation_rows)),
        rel=1e-6,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 0), ("steps", 1.0), ("steps", True), ("batch", 0), ("batch", "64"),
     ("learning_rate", 0), ("learning_rate", -1), ("learning_rate", float("inf")),
     ("learning_rate", True), ("learning_rate", "x")],
)  # fmt: skip
def test_refused_settings(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: got {value!r}"):
        LoopSettings(**{name: value})

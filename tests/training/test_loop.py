"""The tail loop: when it stops, what it keeps, and that a bad step is never the last."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zsu_fast import ArgumentError, Event
from zsu_fast.runtime.progress import Reporter
from zsu_fast.training.features import FeatureSet
from zsu_fast.training.fit_task import FitTask
from zsu_fast.training.loop import LoopSettings, train_tail
from zsu_fast.training.losses import Differential, LogitObjective, MaskedKL
from zsu_fast.training.teacher import Teacher, build_feature_set
from zsu_fast.training.trainer import Fit, ValidationResult

FORGET = torch.tensor([False, True, False, False])


class Scripted(LogitObjective):
    """An objective that does as a script says: ``script(call, logits, rows) -> loss``."""

    def __init__(
        self, script: Callable[[int, Tensor, FeatureSet], Tensor], rate: float | None = None
    ) -> None:
        self.script, self.learning_rate, self.calls = script, rate, 0

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x = logits.detach().requires_grad_(True)
        loss = self.script(self.calls, x, rows)
        (dlogits,) = torch.autograd.grad(loss, x)
        return loss.detach(), dlogits


class Setting:
    """A linear tail and rows of four classes along the axes."""

    def __init__(self) -> None:
        self.tail = nn.Linear(4, 4)
        with torch.no_grad():
            self.tail.weight.copy_(6 * torch.eye(4))
            self.tail.bias.zero_()
        self.start = [p.detach().clone() for p in self.tail.parameters()]
        label = torch.arange(40) % 4
        made = []
        for _ in range(2):
            features = torch.eye(4)[label] + 0.1 * torch.randn(40, 4)
            made.append(
                build_feature_set(
                    Teacher(self.tail, FORGET), (features,), label, 100, torch.Generator()
                )
            )
        self.rows, self.held_out = made
        self.validation_loss = MaskedKL(FORGET, 2.0)

    def train(self, objective: Any = None, callback: Any = None, **settings: Any) -> Fit:
        return train_tail(
            self.task(objective),
            LoopSettings(**({"steps": 200, "batch": 64} | settings)),
            Reporter(False, callback),
        )

    def task(self, objective: Any = None) -> FitTask:
        return FitTask(
            self.tail,
            list(self.tail.parameters()),
            self.rows,
            self.held_out,
            objective or self.validation_loss,
            self.validation_loss,
            torch.Generator().manual_seed(0),
        )

    def divergence(self) -> float:
        with torch.no_grad():
            logits = self.tail(*self.held_out.features)
            return float(self.validation_loss.divergence(logits, self.held_out))

    def unchanged(self) -> bool:
        pairs = zip(self.tail.parameters(), self.start, strict=True)
        return all(torch.equal(p, s) for p, s in pairs)


def gone(setting: Setting) -> bool:
    """Whether no held-out row is answered with the forgotten class."""
    with torch.no_grad():
        return not FORGET[setting.tail(*setting.held_out.features).argmax(1)].any()


def test_it_learns_and_leaves_the_best_state() -> None:
    setting = Setting()
    fit = setting.train()
    assert gone(setting)
    first, best = fit.history[0], fit.best
    assert first.step == 0
    assert math.isnan(first.loss)
    assert first.leak > 0.2
    assert best.divergence == min(c.divergence for c in fit.history) < 0.1 * first.divergence
    assert setting.divergence() == pytest.approx(best.divergence, rel=1e-5)
    assert best.leak == 0
    assert best.agreement > 0.95
    assert fit.learning_rate == best.learning_rate > 0
    assert [c.step for c in fit.history] == sorted({c.step for c in fit.history})


def test_early_stop_goes_back_to_the_best_state() -> None:
    """It learns for 50 steps, then unlearns: the loop must notice and go back."""
    setting = Setting()

    def script(call: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        loss = setting.validation_loss.divergence(logits, rows)
        return loss if call <= 50 else -loss

    fit = setting.train(Scripted(script), learning_rate=0.05, steps=400)
    assert "no gain on held-out impressions" in fit.stopped
    assert "back to the best state" in fit.stopped
    assert 45 <= fit.best.step <= 60
    assert fit.history[-1].step < 400
    assert fit.history[-1].divergence > fit.best.divergence
    assert setting.divergence() == pytest.approx(fit.best.divergence, rel=1e-5)
    assert gone(setting)


def test_without_early_stop_the_last_state_is_kept() -> None:
    setting = Setting()

    def script(call: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        loss = setting.validation_loss.divergence(logits, rows)
        return loss if call <= 50 else -loss

    fit = setting.train(Scripted(script), learning_rate=0.05, early_stop=False)
    assert fit.stopped == "all 200 steps taken"
    assert fit.best is fit.history[-1]
    assert fit.best.step == 200
    assert setting.divergence() == pytest.approx(fit.best.divergence, rel=1e-5)
    assert fit.best.divergence > min(c.divergence for c in fit.history)


def test_the_rate_stays_fixed_without_early_stop() -> None:
    moves: list[list[float]] = []
    for early in (False, True):
        setting = Setting()
        seen: list[Tensor] = []

        def script(_: int, logits: Tensor, __: FeatureSet, seen: list[Tensor] = seen,
                   setting: Setting = setting) -> Tensor:  # fmt: skip
            seen.append(setting.tail.bias.detach().clone())
            return logits[:, 0].mean()  # Adam moves bias 0 by the rate each step

        setting.train(Scripted(script), learning_rate=0.01, early_stop=early, steps=40, batch=140)
        moves.append([float(a[0] - b[0]) for a, b in pairwise(seen)])
    fixed, falling = moves
    assert fixed == pytest.approx([0.01] * 39, rel=1e-2)
    assert len(falling) > 5
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.95 * falling[0]


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("when", [1, 30])
def test_a_loss_that_is_not_finite_rolls_back(early_stop: bool, when: int) -> None:
    setting = Setting()

    def script(call: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        loss = setting.validation_loss.divergence(logits, rows)
        return loss * math.nan if call >= when else loss

    fit = setting.train(Scripted(script), learning_rate=0.05, early_stop=early_stop)
    assert "non-finite values at step" in fit.stopped
    assert all(p.isfinite().all() for p in setting.tail.parameters())
    assert setting.divergence() == pytest.approx(fit.best.divergence, rel=1e-5)
    if when == 1:
        assert setting.unchanged()
        assert fit.best is fit.history[0]
        assert "no state was better than the original" in fit.stopped
        assert fit.learning_rate == 0
    else:
        assert 0 < fit.best.step < 30
        assert not setting.unchanged()


def test_infinite_logits_are_refused_even_where_the_divergence_is_finite() -> None:
    """A forgotten logit at -inf is the mask itself by its divergence, and no finite model."""
    setting = Setting()

    def script(call: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        if call == 30:
            setting.tail.bias.data[1] = -torch.inf
        return setting.validation_loss.divergence(logits, rows)

    fit = setting.train(Scripted(script), learning_rate=0.05)
    assert "non-finite values at step 30" in fit.stopped
    assert fit.best.step < 30
    assert setting.tail.bias.isfinite().all()


def test_a_rate_that_blows_up_is_lowered() -> None:
    """Infinite as soon as a weight has moved far: only the smallest rate stays near enough."""
    setting = Setting()

    def script(_: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        moved = (setting.tail.weight.detach() - setting.start[0]).abs().max()
        blown = torch.where(moved > 3.0, torch.inf, 1.0)
        return setting.validation_loss.divergence(logits, rows) * blown

    fit = setting.train(Scripted(script, rate=4.0), steps=120)
    rates = {c.attempt: c.learning_rate for c in fit.history[1:]}
    assert rates[0] == 4.0
    assert rates[1] < 4.0  # lowered at once, not raised first
    assert fit.learning_rate == min(rates.values()) < 4.0
    assert any(math.isnan(c.divergence) for c in fit.history)
    assert all(p.isfinite().all() for p in setting.tail.parameters())
    assert gone(setting)


def test_the_rate_is_raised_where_it_is_too_low() -> None:
    setting = Setting()
    fit = setting.train(Scripted(lambda _, x, r: setting.validation_loss.divergence(x, r), rate=0.01),
                        steps=60)  # fmt: skip
    rates = [c.learning_rate for c in fit.history if c.attempt == 1]
    assert rates
    assert rates[0] == pytest.approx(0.03)


def test_each_attempt_starts_from_the_original() -> None:
    setting = Setting()
    starts: dict[int, Tensor] = {}

    def script(call: int, logits: Tensor, _: FeatureSet) -> Tensor:
        if call % 5 == 1:
            starts[call] = setting.tail.weight.detach().clone()
        return logits.sum() * 0.0

    fit = setting.train(Scripted(script, rate=0.1), steps=5)
    assert fit.history[-1].attempt == 3
    assert len(starts) == 4
    assert all(torch.equal(w, setting.start[0]) for w in starts.values())


def test_a_given_rate_is_the_only_one() -> None:
    setting = Setting()
    fit = setting.train(learning_rate=1e-6, steps=6)
    assert {c.learning_rate for c in fit.history[1:]} == {1e-6}
    assert fit.history[-1].step == 6


def test_an_unbounded_objective_does_not_run_away() -> None:
    setting = Setting()
    fit = setting.train(Differential(), learning_rate=0.5, steps=400)
    assert all(p.isfinite().all() for p in setting.tail.parameters())
    assert setting.divergence() <= fit.history[0].divergence
    assert setting.divergence() == pytest.approx(fit.best.divergence, rel=1e-4)


def test_the_callback_ends_it_with_the_best_state() -> None:
    setting = Setting()
    events: list[Event] = []

    def callback(event: Event) -> bool:
        events.append(event)
        return len(events) == 12

    fit = setting.train(callback=callback, learning_rate=0.05)
    assert len(events) == 12
    assert "callback asked to stop in fit" in fit.stopped
    assert len(fit.history) == 13
    assert fit.best.divergence == min(c.divergence for c in fit.history)
    assert setting.divergence() == pytest.approx(fit.best.divergence, rel=1e-5)
    assert fit.learning_rate == 0.05
    assert set(events[0].metrics) == {"divergence", "leak", "agreement"}
    assert events[0].stage == "fit"
    assert events[0].total == 200


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("call", [1, 37])
def test_an_exception_leaves_a_state_that_was_checked(
    error: type[BaseException], call: int
) -> None:
    setting = Setting()

    def script(at: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        if at == call:
            raise error("now")
        return setting.validation_loss.divergence(logits, rows)

    with pytest.raises(error, match="now"):
        setting.train(Scripted(script), learning_rate=0.05)
    assert setting.unchanged()


def test_only_the_given_parameters_move() -> None:
    setting = Setting()
    task = setting.task()
    task.parameters = [setting.tail.bias]
    train_tail(task, LoopSettings(20, 64), Reporter(False))
    assert torch.equal(setting.tail.weight, setting.start[0])
    assert not torch.equal(setting.tail.bias, setting.start[1])


def test_every_row_is_used_before_one_comes_again() -> None:
    setting = Setting()
    seen: list[int] = []
    setting.rows.teacher = torch.arange(140.0)[:, None].expand(140, 4)

    def script(_: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        seen.extend(rows.teacher[:, 0].int().tolist())
        return logits.sum() * 0.0

    setting.train(Scripted(script), learning_rate=0.1, steps=14, batch=35, early_stop=False)
    assert len(seen) == 14 * 35
    for at in range(0, 420, 140):
        assert sorted(seen[at : at + 140]) == list(range(140))
    assert seen[:140] != seen[140:280]


def test_a_batch_larger_than_the_rows() -> None:
    setting = Setting()
    setting.train(batch=10_000, steps=80, learning_rate=0.1)
    assert gone(setting)


def test_checks_measure_what_they_say() -> None:
    setting = Setting()
    fit = setting.train(steps=1)
    check: ValidationResult = fit.history[0]
    answer = setting.held_out.teacher.argmax(1)
    assert check.leak == pytest.approx(float(FORGET[answer].float().mean()))
    assert check.agreement == 1.0  # the original agrees with itself where nothing is masked
    assert check.divergence == pytest.approx(
        float(setting.validation_loss.divergence(setting.held_out.teacher, setting.held_out)),
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

"""The tail loop: optimiser steps on cached rows, validated on held-out rows, never left worse off.

Every few steps the tail is scored on rows that it does not train on. The best state is kept; when
nothing improves any more, or values stop being finite, the loop ends and that state comes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, check_flag, is_number
from ..runtime.events import Stopped
from ..runtime.progress import Reporter
from ..runtime.threads import threads_for
from .fit_task import FitTask
from .train_step import LOOPS, Loop, make_train_step

# A step moves the bias of a logit by this share of the logits' spread. By the rate of the weights
# it would hardly move; yet it alone acts on images that are like no impression.
BIAS_STEP = 0.05
# Multiply-adds that a step's forward pass may take by default.
_STEP_WORK = 4_000_000_000


@dataclass(frozen=True)
class LoopSettings:
    """How the tail is trained.

    Attributes:
        steps: most optimiser steps of one attempt; the learning rate falls to 0 over them along
            a half cosine. None for 400, or one a class up to 2,000.
        batch: rows a step; None for 512, fewer (not below 64) where a step would take more than
            4 billion multiply-adds.
        learning_rate: None for the objective's own; that is then raised or lowered, and the loop
            started over, where it fails.
        early_stop: False runs all steps at a fixed rate and keeps the last state (the published
            recipe), unless it is not finite.
        loop: who takes the steps, see `train_step.make_train_step`.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    early_stop: bool = True
    loop: Loop = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.loop, str) or self.loop not in LOOPS:
            raise ArgumentError("loop", f"got {self.loop!r}", f"Pass one of {', '.join(LOOPS)}.")
        check_flag("early_stop", self.early_stop)
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not whole:
                raise ArgumentError(
                    name, f"got {value!r}", "Pass a whole number, 1 or more, or None."
                )
        rate = self.learning_rate
        if rate is not None and (not is_number(rate) or rate <= 0):
            raise ArgumentError("learning_rate", f"got {rate!r}", "Pass a number above 0.")

    def steps_for(self, classes: int) -> int:
        """Steps of one attempt on a model of so many classes."""
        return max(400, min(classes, 2000)) if self.steps is None else self.steps

    def batch_for(self, work: int) -> int:
        """Rows a step of a tail of ``work`` multiply-adds a row."""
        return max(64, min(512, _STEP_WORK // max(1, work))) if self.batch is None else self.batch


@dataclass
class ValidationResult:
    """One look at the held-out rows.

    Attributes:
        step: optimiser steps taken so far, over all attempts.
        attempt: 0 for the first learning rate, 1 for the second, ...
        learning_rate: in force then.
        loss: of the last training batch.
        divergence: mean KL from the masked original to the tail, margin included, in nats.
        leak: share of held-out rows still answered with a forgotten class, 0..1.
        agreement: share of held-out retain rows answered as the masked original does, 0..1.
    """

    step: int
    attempt: int
    learning_rate: float
    loss: float
    divergence: float
    leak: float
    agreement: float


@dataclass
class Fit:
    """How the loop went; the tail is left in its best state.

    Attributes:
        history: every check, the untouched tail first.
        best: the check whose state was kept.
        stopped: why it ended, in words.
        learning_rate: of the attempt that gave the best state.
    """

    history: list[ValidationResult] = field(default_factory=list)
    best: ValidationResult | None = None
    stopped: str = ""
    learning_rate: float = 0.0


def train_tail(task: FitTask, settings: LoopSettings, report: Reporter) -> Fit:
    """Trains the task's parameters by AdamW on its objective, without leaving the tail worse off.

    Args:
        task: what is trained; batches are drawn from its rows without replacement.
        settings: steps, batch, learning rate, stop.
        report: called after every validation.

    Returns:
        The history and why it ended.
    """
    rate = settings.learning_rate or task.objective.learning_rate
    scales = [1.0] * len(task.parameters)
    if rate is None:
        rate = relative_learning_rate(task.parameters)
        if task.validation_loss.forget_logits_only:
            bias_scale = BIAS_STEP * task.train.teacher_std() / rate
            scales = [bias_scale if p.ndim == 1 else 1.0 for p in task.parameters]
    attempt = _Attempt(task, settings, scales)
    fit = Fit()
    start = attempt.save()
    first = attempt.check(0, 0, 0.0, math.nan)
    fit.history.append(first)
    fit.best, best_state = first, start
    factors, number = [1.0], 0
    try:
        while number < len(factors):
            scale = factors[number]
            attempt.load(start)
            with threads_for(task.row_work * attempt.batch, task.device):
                outcome, best, state = attempt.run(number, rate * scale, fit.history, report)
            if best is not None and (not settings.early_stop or _better(best, fit.best)):
                fit.best, best_state, fit.learning_rate = best, state, rate * scale
            fit.stopped = outcome
            if settings.learning_rate or not settings.early_stop:
                break
            if fit.best.leak <= 0.01 and fit.best is not first:
                break
            if number == 0:  # too fast if values blew up, else too slow, as far as one can tell
                blew_up = not math.isfinite(fit.history[-1].divergence)
                factors += [0.3, 0.1, 0.03] if blew_up else [3.0, 0.3, 0.1]
            number += 1
    except Stopped as stop:
        fit.stopped = str(stop)
        if attempt.best is not None and _better(attempt.best, fit.best):
            fit.best, best_state = attempt.best, attempt.best_state
            fit.learning_rate = attempt.best.learning_rate
    finally:  # also on Ctrl-C: never leave the tail in the middle of a bad step
        attempt.load(best_state)
    if fit.best is first:
        fit.stopped += "; no state was better than the original"
    return fit


def _better(new: ValidationResult, old: ValidationResult) -> bool:
    return math.isfinite(new.divergence) and new.divergence < old.divergence


def relative_learning_rate(parameters: list[nn.Parameter]) -> float:
    """A rate at which Adam moves the average weight by 2 % a step."""
    total = sum(float(p.detach().float().square().sum()) for p in parameters if p.ndim > 1)
    count = sum(p.numel() for p in parameters if p.ndim > 1)
    return min(max(0.02 * math.sqrt(total / count), 1e-5), 1e-2) if count and total else 1e-3


class _Attempt:
    """One run of the loop at one learning rate."""

    CHECKS = 40  # looks at the held-out rows in a full run
    PATIENCE = 8  # checks without a gain before it ends
    GAIN = 0.01  # a smaller relative gain is none

    def __init__(self, task: FitTask, settings: LoopSettings, scales: list[float]) -> None:
        self.task, self.parameters = task, task.parameters
        self.steps = settings.steps_for(len(task.validation_loss.forget))
        self.early_stop = settings.early_stop
        self.batch = min(settings.batch_for(task.row_work), len(task.train))
        self.order, self.at = torch.empty(0, dtype=torch.int64), 0
        self.stepper = make_train_step(settings.loop, task, scales)
        self.best: ValidationResult | None = None
        self.best_state: list[Tensor] = []

    def save(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def load(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state, strict=True):
                parameter.copy_(saved)

    def _decay(self, step: int) -> float:
        """Half a cosine from 1 to 0; 1 for the published recipe."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.early_stop else 1.0

    def _draw(self, steps: int) -> Tensor:
        """The rows of the next ``steps`` batches, int64 [steps, batch], each row once an epoch."""
        batches = []
        for _ in range(steps):
            if self.at + self.batch > len(self.order):
                self.order = torch.randperm(len(self.task.train), generator=self.task.generator)
                self.at = 0
            batches.append(self.order[self.at : self.at + self.batch])
            self.at += self.batch
        return torch.stack(batches)

    def check(self, step: int, attempt: int, rate: float, loss: float) -> ValidationResult:
        return ValidationResult(
            step,
            attempt,
            rate,
            loss,
            *self.task.validation_loss.score(self.task.tail, self.task.validation),
        )

    def run(
        self, number: int, rate: float, history: list[ValidationResult], report: Reporter
    ) -> tuple[str, ValidationResult | None, list[Tensor]]:
        """Why it ended, the best check and its state (None where no state was finite)."""
        self.best, self.best_state = None, []
        self.stepper.reset()
        done_before = history[-1].step
        every = max(1, self.steps // self.CHECKS)
        mark, idle, step = math.inf, 0, 0
        while step < self.steps:
            block = range(step, min(step + every, self.steps))
            rates = [rate * self._decay(at) for at in block]
            loss = self.stepper.run(self._draw(len(block)), rates)
            step = block.stop
            check = self.check(done_before + step, number, rate, float(loss))
            history.append(check)
            if not math.isfinite(check.divergence):
                return f"non-finite values at step {step}, rolled back", self.best, self.best_state
            if self.best is None or not self.early_stop or _better(check, self.best):
                self.best, self.best_state = check, self.save()
            report(
                "fit", step, self.steps, divergence=check.divergence, leak=check.leak,
                agreement=check.agreement,
            )  # fmt: skip
            if check.divergence < mark * (1 - self.GAIN):
                mark, idle = check.divergence, 0
            else:
                idle += 1
            if self.early_stop and idle >= self.PATIENCE:
                return (
                    f"no gain on held-out impressions for {idle} checks, back to the best state",
                    self.best,
                    self.best_state,
                )
        return f"all {self.steps} steps taken", self.best, self.best_state

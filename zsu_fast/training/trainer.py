"""The training loop: optimiser steps on stored rows, validated on others, never left worse off.

Every few steps the tail is validated on rows that it is not trained on. When nothing improves any
more, or values stop being finite, the attempt ends; the tail is left in the state to keep.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from ..runtime.progress import Reporter, Stopped
from ..runtime.torch_settings import threads_for
from .fit_task import FitTask
from .train_step import Loop, make_train_step

Keep = Literal["best", "last", "complete"]
Ending = Literal["finished", "diverged", "stopped"]

_GAIN = 0.01  # patience ends when the divergence falls by less than this share


@dataclass
class ValidationResult:
    """The tail on the validation rows.

    Attributes:
        step: optimiser steps taken so far, over all attempts.
        attempt: 0 for the first learning rate, 1 for the second, ...
        learning_rate: the attempt's first; 0 before training.
        loss: of the last training batch; NaN before training.
        divergence: mean KL from the masked original to the tail, margin included, in nats.
        leak: share of validation rows whose top class is a forgotten one, 0..1.
        agreement: share of retained validation rows with the masked original's top class, 0..1.
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
    """How training went.

    Attributes:
        history: every validation, the original tail's first.
        best: the validation of the state that was kept.
        stopped: why training ended, in words.
        learning_rate: of the attempt that gave the kept state; 0 if that is the original.
    """

    history: list[ValidationResult] = field(default_factory=list)
    best: ValidationResult | None = None
    stopped: str = ""
    learning_rate: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """How a `FitTask` is trained.

    Attributes:
        steps: optimiser steps of one attempt, at most.
        batch: rows per step.
        learning_rate: of the first attempt.
        scales: factor on the learning rate of each parameter; None for 1.
        loop: what takes the steps, see `make_train_step`.
        cosine: whether the learning rate falls to 0 along half a cosine, or stays as it is.
        replacement: draw batches with replacement, the same in every attempt, instead of every row
            once per epoch.
        validations: per full attempt.
        patience: validations without a gain after which an attempt ends; None to take all steps.
        keep: "best": the state of least divergence over all attempts; "last": the last finite
            state, but only if it is better than the original when training is stopped from
            outside; "complete": the last state of an attempt that does not diverge.
        leak_goal: no further attempt is made once the kept state's leak is at most this.
        slower: factors on the learning rate of further attempts if the first one diverges.
        other: the same if the first one misses the goal otherwise.
    """

    steps: int
    batch: int
    learning_rate: float
    scales: Sequence[float] | None = None
    loop: Loop = "eager"
    cosine: bool = True
    replacement: bool = False
    validations: int = 40
    patience: int | None = 8
    keep: Keep = "best"
    leak_goal: float = 0.01
    slower: tuple[float, ...] = ()
    other: tuple[float, ...] = ()

    def decay(self, step: int) -> float:
        """Factor on the learning rate at ``step``."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0

    def keeps(self, new: ValidationResult, old: ValidationResult, ending: Ending) -> bool:
        """Whether the state of ``new`` replaces that of ``old`` after an attempt."""
        if self.keep == "complete":
            return ending != "diverged"
        if self.keep == "last" and ending != "stopped":
            return True
        return _is_better(new, old)


class Trainer:
    """Trains a task's parameters in one or more attempts and leaves them in the state to keep.

    Args:
        task: what is trained; changed in place.
        schedule: how.
        report: called after every validation; a stop that it asks for ends training.
    """

    def __init__(self, task: FitTask, schedule: Schedule, report: Reporter) -> None:
        self.task, self.schedule, self.report = task, schedule, report
        self.fit = Fit()
        self._train_step = make_train_step(schedule.loop, task, schedule.scales)
        draw = _with_replacement if schedule.replacement else _epochs
        self._seed = task.generator.get_state()
        self._batches = draw(len(task.train), schedule.batch, task.generator)
        self._candidate: tuple[ValidationResult, list[Tensor]] | None = None

    def run(self) -> Fit:
        """Makes attempts until the goal is met or no learning rate is left."""
        start = self._state()
        first = self._validate(0, 0, 0.0, math.nan)
        self.fit.history.append(first)
        self.fit.best, self._best_state = first, start
        rates, number = deque([self.schedule.learning_rate]), 0
        try:
            while rates:
                rate = rates.popleft()
                self._load(start)
                ending = self._attempt(number, rate)
                self._keep_candidate(rate, ending)
                reached = self.fit.best is not first and (
                    self.fit.best.leak <= self.schedule.leak_goal
                )
                if reached or ending == "stopped":
                    break
                if number == 0:  # too high a rate if it diverged, else more likely too low a one
                    diverged = ending == "diverged"
                    factors = self.schedule.slower if diverged else self.schedule.other
                    rates.extend(rate * factor for factor in factors)
                number += 1
        finally:  # also on Ctrl-C: never leave the tail in the middle of a bad step
            self._load(self._best_state)
        return self.fit

    def _attempt(self, number: int, rate: float) -> Ending:
        """Trains at one learning rate."""
        self._candidate = None
        self._train_step.reset()
        if self.schedule.replacement:
            self.task.generator.set_state(self._seed)
        with threads_for(self.task.row_work * self.schedule.batch, self.task.device):
            try:
                self.fit.stopped, ending = self._steps(number, rate)
            except Stopped as stop:
                self.fit.stopped, ending = str(stop), "stopped"
        return ending

    def _steps(self, number: int, rate: float) -> tuple[str, Ending]:
        """Takes an attempt's steps; returns why it ended."""
        schedule, steps = self.schedule, self.schedule.steps
        before = self.fit.history[-1].step
        every = max(1, steps // schedule.validations)
        lowest, idle = math.inf, 0
        for start in range(0, steps, every):
            block = range(start, min(start + every, steps))
            index = torch.stack(list(islice(self._batches, len(block))))
            loss = self._train_step.run(index, [rate * schedule.decay(at) for at in block])
            result = self._validate(before + block.stop, number, rate, float(loss))
            self.fit.history.append(result)
            if not math.isfinite(result.divergence):
                return f"non-finite values at step {block.stop}, rolled back", "diverged"
            self._note(result)
            self.report(
                "fit", block.stop, steps, divergence=result.divergence, leak=result.leak,
                agreement=result.agreement,
            )  # fmt: skip
            if result.divergence < lowest * (1 - _GAIN):
                lowest, idle = result.divergence, 0
            else:
                idle += 1
            if schedule.patience is not None and idle >= schedule.patience:
                reason = (
                    f"no gain on held-out impressions for {idle} checks, back to the best state"
                )
                return reason, "finished"
        return f"all {steps} steps taken", "finished"

    def _note(self, result: ValidationResult) -> None:
        """Makes the current state the attempt's candidate, unless an earlier one is better."""
        if (
            self._candidate is None
            or self.schedule.keep != "best"
            or _is_better(result, self._candidate[0])
        ):
            self._candidate = result, self._state()

    def _keep_candidate(self, rate: float, ending: Ending) -> None:
        assert self.fit.best is not None
        if self._candidate is None:
            return
        result, state = self._candidate
        if self.schedule.keeps(result, self.fit.best, ending):
            self.fit.best, self._best_state, self.fit.learning_rate = result, state, rate

    def _validate(self, step: int, attempt: int, rate: float, loss: float) -> ValidationResult:
        task = self.task
        score = task.validation_loss.score(task.tail, task.validation)
        return ValidationResult(step, attempt, rate, loss, *score)

    def _state(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.task.parameters]

    def _load(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, saved in zip(self.task.parameters, state, strict=True):
                parameter.copy_(saved)


def _is_better(new: ValidationResult, old: ValidationResult) -> bool:
    return math.isfinite(new.divergence) and new.divergence < old.divergence


def _epochs(rows: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields batches of row indices, int64 [batch]; each row at most once per permutation."""
    while True:
        order = torch.randperm(rows, generator=generator)
        for at in range(0, rows - batch + 1, batch):
            yield order[at : at + batch]


def _with_replacement(rows: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields batches of row indices, int64 [batch]."""
    while True:
        yield torch.randint(rows, (batch,), generator=generator)

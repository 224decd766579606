"""The training loop: optimiser steps on some rows, every few of them validated on others.

When nothing improves any more, or values stop being finite, the attempt ends; the tail is left in
the state to keep, which is never worse than the original.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, check_choice, check_flag, check_int, is_number
from ..runtime.cuda_graph import LOOPS, Loop
from ..runtime.progress import Reporter, Stopped
from ..runtime.torch_settings import threads_for
from .fit_task import FitTask, copied_values, load_values
from .train_step import make_train_step

Keep = Literal["best", "last", "complete"]
Ending = Literal["finished", "diverged", "stopped"]

_LEAK_GOAL = 0.01  # no further attempt is made once the kept state leaks no more than this
AGREEMENT_GOAL = 0.98  # share of retained rows with the masked original's answer
RELATIVE_STEP = 0.02  # of Adam's steps, as a share of the weights' root mean square
_GAIN = 0.01  # patience ends when the divergence falls by less than this share
_STEP_WORK = 4_000_000_000  # multiply-adds of a step's forward pass by default
# Bias step per optimiser step, as a fraction of the logits' standard deviation. At the weights'
# learning rate biases barely move, yet only they affect images unlike any impression.
_BIAS_STEP = 0.05


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
        forgotten_leak: share of the validation rows of forgotten classes whose top class is one,
            0..1; NaN if there is no such row.
    """

    step: int
    attempt: int
    learning_rate: float
    loss: float
    divergence: float
    leak: float
    agreement: float
    forgotten_leak: float = math.nan

    @property
    def shortfall(self) -> float:
        """By how much leak and agreement miss their goals; 0 if neither does."""
        return max(0.0, self.leak - _LEAK_GOAL) + max(0.0, AGREEMENT_GOAL - self.agreement)

    def better_than(self, other: ValidationResult, strictly: bool = False) -> bool:
        """Whether it has the lower divergence; ``strictly``, the shortfall counts first, unless
        ``other`` is the original.
        """
        if strictly and other.step and self.shortfall != other.shortfall:
            return self.shortfall < other.shortfall
        return self.divergence < other.divergence


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
        replacement: draw batches with replacement, by the task's ``sampling`` and the same in
            every attempt, instead of every row once per epoch.
        validations: per full attempt.
        patience: validations without a gain after which an attempt ends; None to take all steps.
        keep: "best": the best state over all attempts, see `ValidationResult.better_than`; "last":
            the last finite state, but only if it is better than the original when training is
            stopped from outside; "complete": the last state of the first attempt that does not
            diverge.
        strict: whether too many changed answers of retained rows also call for further attempts,
            and states with fewer are preferred.
        slower: factors on the learning rate of further attempts if the first one diverges, or, if
            ``strict``, changes too many answers.
        other: the same if the first one leaks.
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
    strict: bool = False
    slower: tuple[float, ...] = ()
    other: tuple[float, ...] = ()

    def decay(self, step: int) -> float:
        """Factor on the learning rate at ``step``."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0

    def keeps(self, new: ValidationResult, old: ValidationResult, ending: Ending) -> bool:
        """Whether the state of ``new`` replaces that of ``old`` after an attempt."""
        if self.keep == "complete":
            return ending != "diverged"
        return new.better_than(old, self.strict) or (self.keep == "last" and ending != "stopped")


@dataclass(frozen=True)
class LoopSettings:
    """How the tail is trained.

    Attributes:
        steps: optimiser steps of one attempt, at most; None for 400, or one per class up to 2,000.
            The learning rate falls to 0 over them along half a cosine.
        batch: rows per step; None for 512, or fewer, but not below 64, if a step's forward pass
            would take more than 4 billion multiply-adds.
        learning_rate: None for the objective's own; if training fails at that, it is raised or
            lowered, and training starts over.
        early_stop: False takes all steps at a fixed rate and keeps the last finite state, as the
            paper does.
        loop: what takes the steps, see `make_train_step`.

    Raises:
        ArgumentError: a value is out of range.
    """

    steps: int | None = None
    batch: int | None = None
    learning_rate: float | None = None
    early_stop: bool = True
    loop: Loop = "auto"

    def __post_init__(self) -> None:
        check_choice("loop", self.loop, LOOPS)
        check_flag("early_stop", self.early_stop)
        check_int("steps", self.steps, optional=True)
        check_int("batch", self.batch, optional=True)
        rate = self.learning_rate
        if rate is not None and (not is_number(rate) or rate <= 0):
            raise ArgumentError("learning_rate", f"got {rate!r}", "Pass a number above 0.")

    def steps_for(self, classes: int) -> int:
        """Steps of one attempt for a model of ``classes``."""
        return max(400, min(classes, 2000)) if self.steps is None else self.steps

    def batch_for(self, row_work: int) -> int:
        """Rows per step for a tail of ``row_work`` multiply-adds per row."""
        if self.batch is not None:
            return self.batch
        return max(64, min(512, _STEP_WORK // max(1, row_work)))

    def schedule(self, task: FitTask) -> Schedule:
        rate, scales = self._learning_rates(task)
        retry = self.early_stop and self.learning_rate is None
        return Schedule(
            steps=self.steps_for(len(task.validation_loss.forget)),
            batch=min(self.batch_for(task.row_work), len(task.train)),
            learning_rate=rate,
            scales=scales,
            loop=self.loop,
            cosine=self.early_stop,
            patience=Schedule.patience if self.early_stop else None,
            keep="best" if self.early_stop else "last",
            strict=task.coupled,
            slower=(0.3, 0.1, 0.03) if retry else (),
            other=(3.0, 0.3, 0.1) if retry else (),
        )

    def _learning_rates(self, task: FitTask) -> tuple[float, list[float] | None]:
        """The learning rate, and a factor on it for each parameter."""
        rate = self.learning_rate or task.objective.learning_rate
        if rate is not None:
            return rate, None
        rate = relative_learning_rate(task.parameters)
        if not task.scale_biases:
            return rate, None
        bias_scale = _BIAS_STEP * task.train.teacher_std() / rate
        return rate, [bias_scale if p.ndim == 1 else 1.0 for p in task.parameters]


def train_tail(task: FitTask, settings: LoopSettings, report: Reporter) -> Fit:
    """Trains the task's parameters in place by AdamW, without leaving the tail worse off.

    ``report`` is called after every validation; see `Trainer`.
    """
    fit = Trainer(task, settings.schedule(task), report).run()
    if fit.best is fit.history[0]:
        fit.stopped += "; no state was better than the original"
    return fit


def relative_learning_rate(parameters: Sequence[nn.Parameter]) -> float:
    """A learning rate at which Adam moves the average weight by `RELATIVE_STEP` per step."""
    total = sum(float(p.detach().float().square().sum()) for p in parameters if p.ndim > 1)
    count = sum(p.numel() for p in parameters if p.ndim > 1)
    if not count or not total:
        return 1e-3
    return min(max(RELATIVE_STEP * math.sqrt(total / count), 1e-5), 1e-2)


class Trainer:
    """Trains a task's parameters in one or more attempts and leaves them in the state to keep.

    ``report`` is called after every validation; a stop that it asks for ends training.
    """

    def __init__(self, task: FitTask, schedule: Schedule, report: Callable[..., None]) -> None:
        self.task, self.schedule, self.report = task, schedule, report
        self.fit = Fit()
        self._train_step = make_train_step(schedule.loop, task, schedule.scales)
        self._seed = task.generator.get_state()
        rows, batch = len(task.train), schedule.batch
        self._batches = (
            _with_replacement(rows, batch, task.generator, task.sampling)
            if schedule.replacement
            else _epochs(rows, batch, task.generator)
        )
        self._candidate: tuple[ValidationResult, list[Tensor]] | None = None

    def run(self) -> Fit:
        """Makes attempts until the goal is met or no learning rate is left."""
        start = copied_values(self.task.parameters)
        first = self._validate(0, 0, 0.0, math.nan)
        self.fit.history.append(first)
        self.fit.best, self._best_state = first, start
        if self.task.start is not None:
            start = list(self.task.start)
        if self.task.settled:
            return self._settle(start)
        rates, number = deque([self.schedule.learning_rate]), 0
        try:
            while rates:
                rate = rates.popleft()
                load_values(self.task.parameters, start)
                ending = self._attempt(number, rate)
                best = self.fit.best
                met = best.shortfall == 0 if self.schedule.strict else best.leak <= _LEAK_GOAL
                done = best is not first and (met or self.schedule.keep == "complete")
                if ending == "stopped" or done:
                    break
                if number == 0:  # if it leaks, the rate is more likely too low than too high
                    leaks = ending != "diverged" and (best is first or best.leak > _LEAK_GOAL)
                    factors = self.schedule.other if leaks else self.schedule.slower
                    rates.extend(rate * factor for factor in factors)
                number += 1
        finally:  # also on Ctrl-C: never leave the tail in the middle of a bad step
            load_values(self.task.parameters, self._best_state)
        return self.fit

    def _settle(self, state: list[Tensor]) -> Fit:
        """Takes the state that training would start from."""
        load_values(self.task.parameters, state)
        self.fit.best = self._validate(0, 0, 0.0, math.nan)
        self.fit.history.append(self.fit.best)
        self.fit.stopped = (
            "the forgotten logits are the mean of the others, so that they are never the highest, "
            "whatever the image"
        )
        return self.fit

    def _attempt(self, number: int, rate: float) -> Ending:
        self._candidate = None
        self._train_step.reset()
        if self.schedule.replacement:
            self.task.generator.set_state(self._seed)
        with threads_for(self.task.row_work * self.schedule.batch, self.task.device):
            try:
                self.fit.stopped, ending = self._steps(number, rate)
            except Stopped as stop:
                self.fit.stopped, ending = str(stop), "stopped"
        assert self.fit.best is not None
        if self._candidate is not None:
            result, state = self._candidate
            if self.schedule.keeps(result, self.fit.best, ending):
                self.fit.best, self._best_state, self.fit.learning_rate = result, state, rate
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
            old = self._candidate
            better = old is None or result.better_than(old[0], schedule.strict)
            if better or schedule.keep != "best":
                self._candidate = result, copied_values(self.task.parameters)
            names = ("divergence", "leak", "agreement")
            self.report("fit", block.stop, steps, **{n: getattr(result, n) for n in names})
            if result.divergence < lowest * (1 - _GAIN):
                lowest, idle = result.divergence, 0
            else:
                idle += 1
            if schedule.patience is not None and idle >= schedule.patience:
                reason = f"no gain on held-out impressions for {idle} checks"
                return f"{reason}, back to the best state", "finished"
        return f"all {steps} steps taken", "finished"

    def _validate(self, step: int, attempt: int, rate: float, loss: float) -> ValidationResult:
        score = self.task.validation_loss.score(self.task.tail, self.task.validation)
        return ValidationResult(step, attempt, rate, loss, *score)


def _epochs(rows: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yields batches of row indices, int64 [batch]; each row at most once per permutation."""
    while True:
        order = torch.randperm(rows, generator=generator)
        for at in range(0, rows - batch + 1, batch):
            yield order[at : at + batch]


def _with_replacement(
    rows: int, batch: int, generator: torch.Generator, sampling: Tensor | None
) -> Iterator[Tensor]:
    """Yields batches of row indices, int64 [batch], drawn in proportion to ``sampling``."""
    weights = torch.ones(rows) if sampling is None else sampling
    while True:
        yield torch.multinomial(weights, batch, replacement=True, generator=generator)

"""How a tail is trained at the output level: settings, learning rates, attempts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ArgumentError, check_choice, check_flag, check_int, is_number
from ..runtime.progress import Reporter
from .fit_task import FitTask
from .train_step import LOOPS, Loop
from .trainer import Fit, Schedule, Trainer

# Bias step per optimiser step, as a fraction of the logits' standard deviation. At the weights'
# learning rate biases barely move, yet only they affect images unlike any impression.
BIAS_STEP = 0.05
# Multiply-adds of a step's forward pass by default.
_STEP_WORK = 4_000_000_000


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
        """The schedule for ``task``."""
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
            slower=(0.3, 0.1, 0.03) if retry else (),
            other=(3.0, 0.3, 0.1) if retry else (),
        )

    def _learning_rates(self, task: FitTask) -> tuple[float, list[float] | None]:
        """The learning rate, and a factor for each parameter."""
        rate = self.learning_rate or task.objective.learning_rate
        if rate is not None:
            return rate, None
        rate = relative_learning_rate(task.parameters)
        if not task.validation_loss.forget_logits_only:
            return rate, None
        bias_scale = BIAS_STEP * task.train.teacher_std() / rate
        return rate, [bias_scale if p.ndim == 1 else 1.0 for p in task.parameters]


def train_tail(task: FitTask, settings: LoopSettings, report: Reporter) -> Fit:
    """Trains the task's parameters by AdamW on its objective, without leaving the tail worse off.

    Args:
        task: what is trained, in place.
        settings: steps, batch, learning rate, early stop.
        report: called after every validation.

    Returns:
        The history and why training ended.
    """
    fit = Trainer(task, settings.schedule(task), report).run()
    if fit.best is fit.history[0]:
        fit.stopped += "; no state was better than the original"
    return fit


def relative_learning_rate(parameters: Sequence[nn.Parameter]) -> float:
    """A learning rate at which Adam moves the average weight by 2 % per step."""
    total = sum(float(p.detach().float().square().sum()) for p in parameters if p.ndim > 1)
    count = sum(p.numel() for p in parameters if p.ndim > 1)
    return min(max(0.02 * math.sqrt(total / count), 1e-5), 1e-2) if count and total else 1e-3

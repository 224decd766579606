"""A small case for the tests of training: a linear tail on four classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zsu_fast.runtime.progress import Reporter
from zsu_fast.training.features import FeatureSet
from zsu_fast.training.fit_task import FitTask
from zsu_fast.training.losses import MaskedKL, Objective
from zsu_fast.training.teacher import Teacher, build_feature_set
from zsu_fast.training.trainer import Fit, LoopSettings, train_tail

FORGET = torch.tensor([False, True, False, False])


class Scripted(Objective):
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


class LinearCase:
    """A linear tail, and training and validation rows of four classes along the axes."""

    def __init__(self) -> None:
        self.tail = nn.Linear(4, 4)
        with torch.no_grad():
            self.tail.weight.copy_(6 * torch.eye(4))
            self.tail.bias.zero_()
        self.start = [p.detach().clone() for p in self.tail.parameters()]
        label = torch.arange(40) % 4
        sets = []
        for _ in range(2):
            features = torch.eye(4)[label] + 0.1 * torch.randn(40, 4)
            sets.append(
                build_feature_set(
                    Teacher(self.tail, FORGET), (features,), label, 100, torch.Generator()
                )
            )
        self.train_rows, self.validation_rows = sets
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
            self.train_rows,
            self.validation_rows,
            objective or self.validation_loss,
            self.validation_loss,
            torch.Generator().manual_seed(0),
        )

    def divergence(self) -> float:
        with torch.no_grad():
            logits = self.tail(*self.validation_rows.features)
            return float(self.validation_loss.divergence(logits, self.validation_rows))

    def unchanged(self) -> bool:
        pairs = zip(self.tail.parameters(), self.start, strict=True)
        return all(torch.equal(p, s) for p, s in pairs)

    def forgets(self) -> bool:
        """Whether no validation row has the forgotten class on top."""
        with torch.no_grad():
            return not FORGET[self.tail(*self.validation_rows.features).argmax(1)].any()

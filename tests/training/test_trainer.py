"""Schedules other than the tail's: what deep forgetting asks of the trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_case import LinearCase, Scripted
from torch import Tensor

from zsu_fast.runtime.progress import Reporter
from zsu_fast.training.features import FeatureSet
from zsu_fast.training.fit_task import FitTask
from zsu_fast.training.trainer import Fit, Schedule, Trainer


def fit(task: FitTask, callback: Any = None, **schedule: Any) -> Fit:
    options: dict[str, Any] = {"steps": 40, "batch": 32, "learning_rate": 0.05, "validations": 10}
    return Trainer(task, Schedule(**options | schedule), Reporter(False, callback)).run()


def diverging(case: LinearCase, when: int, attempts: int) -> Scripted:
    """The masked objective, with a NaN at step ``when`` of the first ``attempts``."""
    last = {"start": case.start[0], "step": 0, "attempt": -1}

    def script(_: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        if torch.equal(case.tail.weight.detach(), case.start[0]):
            last["step"], last["attempt"] = 0, last["attempt"] + 1
        last["step"] += 1
        loss = case.validation_loss.divergence(logits, rows)
        return loss * math.nan if last["step"] >= when and last["attempt"] < attempts else loss

    return Scripted(script)


@pytest.mark.parametrize("attempts", [0, 1, 3])
def test_a_diverging_attempt_is_repeated_at_lower_rates(attempts: int) -> None:
    case = LinearCase()
    result = fit(
        case.task(diverging(case, 13, attempts)),
        keep="complete", patience=None, slower=(0.3, 0.09, 0.027),
    )  # fmt: skip
    rates = {c.attempt: c.learning_rate for c in result.history[1:]}
    assert list(rates.values()) == pytest.approx([0.05, 0.015, 0.0045, 0.00135][: attempts + 1])
    assert result.stopped == "all 40 steps taken"
    assert result.best is result.history[-1]
    assert result.learning_rate == rates[attempts]
    assert case.divergence() == pytest.approx(result.best.divergence, rel=1e-5)


def test_if_every_attempt_diverges_the_tail_stays_as_it_is() -> None:
    case = LinearCase()
    result = fit(
        case.task(diverging(case, 13, 9)),
        keep="complete", patience=None, slower=(0.3, 0.09, 0.027),
    )  # fmt: skip
    assert max(c.attempt for c in result.history) == 3
    assert result.best is result.history[0]
    assert result.learning_rate == 0
    assert case.unchanged()  # although finite states were validated in every attempt


@pytest.mark.parametrize("keep", ["best", "last", "complete"])
def test_what_a_stop_keeps(keep: str) -> None:
    """Trained to be worse than the original, then stopped from outside."""
    case = LinearCase()
    worse = Scripted(lambda _, x, rows: -case.validation_loss.divergence(x, rows))
    result = fit(case.task(worse), lambda event: event.done >= 20, keep=keep, patience=None)
    assert "callback asked to stop" in result.stopped
    assert result.history[-1].step == 20
    if keep == "complete":
        assert result.best is result.history[-1]
        assert case.divergence() == pytest.approx(result.best.divergence, rel=1e-5)
    else:
        assert result.best is result.history[0]
        assert case.unchanged()


def test_batches_with_replacement_are_the_same_in_every_attempt() -> None:
    case = LinearCase()
    batches: list[Tensor] = []
    case.train_rows.teacher = torch.arange(140.0)[:, None].expand(140, 4)

    def script(_: int, logits: Tensor, rows: FeatureSet) -> Tensor:
        batches.append(rows.teacher[:, 0].int())
        return logits.sum() * 0.0

    fit(
        case.task(Scripted(script)),
        steps=6, batch=100, replacement=True, other=(0.5,), patience=None,
    )  # fmt: skip
    assert len(batches) == 12
    assert all(torch.equal(a, b) for a, b in zip(batches[:6], batches[6:], strict=True))
    assert not torch.equal(batches[0], batches[1])
    assert len(batches[0].unique()) < 100
    draw = torch.Generator().manual_seed(0)
    first = torch.multinomial(torch.ones(140), 100, replacement=True, generator=draw)
    assert torch.equal(batches[0], first.int())


def test_masked_weights_stay_as_they_are() -> None:
    case = LinearCase()
    task = case.task()
    task.masks = [(torch.arange(16).view(4, 4) % 2).float(), None]
    fit(task)
    odd = torch.arange(16).view(4, 4) % 2 == 1
    assert torch.equal(case.tail.weight[~odd], case.start[0][~odd])
    assert bool((case.tail.weight[odd] != case.start[0][odd]).all())
    assert not torch.equal(case.tail.bias, case.start[1])


def test_the_task_says_how_often_each_row_is_drawn() -> None:
    case = LinearCase()
    task = case.task(Scripted(lambda _, logits, rows: drawn.append(rows.teacher) or logits.sum()))
    drawn: list[Tensor] = []
    case.train_rows.teacher = torch.arange(140.0)[:, None].expand(140, 4)
    task.sampling = torch.cat([torch.zeros(40), torch.ones(50), torch.full((50,), 3.0)])
    fit(task, steps=20, batch=100, replacement=True, patience=None, keep="last")
    rows = torch.cat(drawn)[:, 0]
    assert float(rows.min()) == 40
    assert float((rows >= 90).float().mean()) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_the_steps_are_those_of_torch_optim(betas: tuple[float, float]) -> None:
    tails = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        case = LinearCase()
        task = case.task()
        task.betas = betas
        if not by_hand:
            fit(task, steps=5, validations=1, replacement=True, keep="last", patience=None)
        else:
            optimiser = torch.optim.AdamW(task.parameters, betas=betas, weight_decay=0.0)
            draw = torch.Generator().manual_seed(0)
            for step in range(5):
                rows = case.train_rows.select(
                    torch.multinomial(torch.ones(140), 32, True, generator=draw)
                )
                optimiser.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 5))
                grads = case.validation_loss.gradients(case.tail, task.parameters, rows)[1]
                for parameter, grad in zip(task.parameters, grads, strict=True):
                    parameter.grad = grad
                optimiser.step()
        tails.append(case.tail)
    assert torch.allclose(tails[0].weight, tails[1].weight, atol=1e-5)
    assert torch.allclose(tails[0].bias, tails[1].bias, atol=1e-5)

"""What a task trains, and the margin that it asks for."""

from __future__ import annotations

import math

import pytest
import torch
from feature_case import FORGET, case
from torch import nn

from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting.split import find_split
from zsu_fast.training import fit_task
from zsu_fast.training.class_subset import ClassSubsetTail
from zsu_fast.training.features import FeatureSettings, MemoryLimits, held_out, logit_margin
from zsu_fast.training.fit_task import FitTask, make_fit_task
from zsu_fast.training.losses import MaskedKL, ObjectiveSettings


def task_of(
    classes: int,
    tail: int | str = "last",
    objective: str = "masked",
    settings: FeatureSettings | None = None,
) -> tuple[FitTask, float]:
    """A task of a two-layer model, and the mean logit margin of its training impressions."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, classes))
    work = working_copy(model, torch.device("cpu"))
    images = torch.randn(3 * classes, 3, 2, 2)
    with torch.no_grad():
        logits = work(images)
    labels = logits.argmax(1)  # some classes have none, some enough to hold some out
    split = find_split(work, tail, images[:4], labels[:4])
    forget = torch.arange(classes) < 2
    chosen = ObjectiveSettings(objective)  # type: ignore[arg-type]
    features = split.features(images)
    task = make_fit_task(
        work, split, features, labels, forget, chosen, settings or FeatureSettings(mixtures=0), 0
    )
    return task, float(logit_margin(logits, labels)[~held_out(labels)].mean())


def margin_of(task: FitTask) -> float:
    loss = task.validation_loss
    assert isinstance(loss, MaskedKL)
    return loss.margin


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize(
    ("tail", "objective", "factor"),
    [("last", "masked", 4), (2, "masked", 4), ("last", "differential", 2)],
    ids=["output level", "deeper tail", "differential"],
)
def test_the_default_margin(classes: int, tail: int | str, objective: str, factor: int) -> None:
    """Twice as large where the retained logits keep their values."""
    torch.manual_seed(0)
    task, mean = task_of(classes, tail, objective)
    only_rows = (tail, objective) == ("last", "masked")
    assert task.validation_loss.forget_logits_only == only_rows
    assert isinstance(task.tail, ClassSubsetTail) == (only_rows and classes == 1000)
    assert mean > 0
    assert margin_of(task) == pytest.approx(factor * math.log10(classes) * mean, rel=1e-4)


def test_a_given_margin_is_taken_as_it_is() -> None:
    for tail in ("last", 2):
        task, _ = task_of(10, tail, settings=FeatureSettings(mixtures=0, margin=1.5))
        assert margin_of(task) == 1.5


def test_few_classes_are_trained_whole_whatever_is_trained() -> None:
    task, _ = task_of(10)
    assert not isinstance(task.tail, ClassSubsetTail)
    limits = MemoryLimits(subset_above=9)
    task, _ = task_of(10, settings=FeatureSettings(mixtures=0, limits=limits))
    assert isinstance(task.tail, ClassSubsetTail)
    assert [tuple(p.shape) for p in task.parameters] == [(2, 16), (2,)]


def test_the_work_per_row_is_the_tails() -> None:
    assert task_of(10)[0].row_work == 160
    assert task_of(10, 2)[0].row_work == 160 + 12 * 16


def test_a_tail_that_is_a_linear_layer_is_trained_without_its_graph() -> None:
    task, _ = task_of(10)
    assert type(task.tail) is nn.Linear
    assert {id(p) for p in task.tail.parameters()} == {id(p) for p in task.parameters}
    assert type(task_of(10, tail=2)[0].tail) is not nn.Linear


def test_a_linear_layer_with_a_hook_keeps_its_graph() -> None:
    class Hooked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = nn.Linear(4, 3)
    layers: list[tuple[nn.Module, bool]] = [(layer, True), (Hooked(4, 3), False)]
    for found, plain in layers:
        tail = torch.fx.symbolic_trace(nn.Sequential(found))
        chosen = fit_task._linear_layer(tail, list(tail.parameters()))
        assert (chosen is not None) is plain
    tail = torch.fx.symbolic_trace(nn.Sequential(layer))
    assert fit_task._linear_layer(tail, [layer.weight]) is None
    tail.get_submodule("0").register_forward_hook(lambda _m, _args, out: 2 * out)
    assert fit_task._linear_layer(tail, list(tail.parameters())) is None


@pytest.mark.parametrize("forget_logits_only", [False, True])
def test_gradients_of_a_linear_layer_are_those_of_autograd(forget_logits_only: bool) -> None:
    torch.manual_seed(0)
    _, _, rows = case()
    layer = nn.Linear(6, 4)
    loss = MaskedKL(FORGET, 1.5, forget_logits_only, keep=0.0 if forget_logits_only else 8.0)
    parameters = [layer.bias, layer.weight]
    got_loss, got = loss.gradients(layer, parameters, rows)
    want_loss, want = loss.gradients(nn.Sequential(layer), parameters, rows)
    torch.testing.assert_close(got_loss, want_loss)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

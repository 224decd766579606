"""A tail restricted to some classes: the same logits, losses and fits as the whole tail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import QUICK, assert_forgets, tiny
from torch import Tensor, nn

from zsu_fast import ZeroShotUnlearner
from zsu_fast.training.class_subset import ClassSubsetTail, supports_subset
from zsu_fast.training.features import FeatureSet, MemoryLimits
from zsu_fast.training.losses import ForgetOnlyKL, MaskedKL
from zsu_fast.training.teacher import Teacher, build_feature_set

CLASSES, FEATURES = 40, 12
FORGOTTEN = [3, 17, 39]
ROWS = 30


def forget_mask() -> Tensor:
    mask = torch.zeros(CLASSES, dtype=torch.bool)
    mask[FORGOTTEN] = True
    return mask


def rows_of(tail: nn.Module, names: list[str], **limits: int) -> FeatureSet:
    """Mixtures of random features, labelled by ``tail``; the same at each call."""
    features = torch.rand(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        label = tail(features).argmax(1)
    draw = torch.Generator().manual_seed(1)
    teacher = Teacher(tail, forget_mask(), names, MemoryLimits(**limits))
    return build_feature_set(teacher, (features,), label, 200, draw)


@pytest.mark.parametrize("classes", [torch.tensor([3, 17, 39]), slice(10, 30)], ids=str)
def test_a_subset_tail_gives_the_full_tails_columns(classes: Any) -> None:
    tail, x = nn.Linear(FEATURES, CLASSES), torch.randn(5, FEATURES)
    subset = ClassSubsetTail(tail, ["weight", "bias"], classes, trainable=True)
    torch.testing.assert_close(subset(x), tail(x)[:, classes])
    assert [len(p) for p in subset.parameters()] == [len(torch.arange(CLASSES)[classes])] * 2


def test_rows_are_written_back_and_no_others() -> None:
    tail = nn.Linear(FEATURES, CLASSES)
    before = tail.weight.detach().clone()
    subset = ClassSubsetTail(tail, ["weight", "bias"], torch.tensor(FORGOTTEN), trainable=True)
    with torch.no_grad():
        for parameter in subset.parameters():
            parameter.add_(1)
    assert torch.equal(tail.weight, before)
    subset.write_back()
    assert torch.equal(tail.weight[FORGOTTEN], before[FORGOTTEN] + 1)
    assert torch.equal(tail.weight[~forget_mask()], before[~forget_mask()])


class Pooled(nn.Module):
    """A convolution to classes, then a mean: as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))


class Normalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).log_softmax(1)


class Reshaped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1, CLASSES)


@pytest.mark.parametrize(
    ("tail", "x", "supported"),
    [
        (nn.Linear(FEATURES, CLASSES), torch.randn(5, FEATURES), True),
        (Pooled(), torch.randn(5, 4, 3, 3), True),
        (Normalised(FEATURES, CLASSES), torch.randn(5, FEATURES), False),
        (Reshaped(FEATURES, CLASSES), torch.randn(5, FEATURES), False),
    ],
    ids=["linear", "pooled convolution", "log-softmax", "view"],
)
def test_only_logits_that_do_not_depend_on_others_are_supported(
    tail: nn.Module, x: Tensor, supported: bool
) -> None:
    assert supports_subset(tail, [n for n, _ in tail.named_parameters()], (x,)) == supported


def test_the_forget_only_loss_is_the_masked_one_from_two_numbers_per_row() -> None:
    tail, student = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)
    with torch.no_grad():  # the student has other forgotten logits
        for parameter in (tail.weight, tail.bias):
            parameter.mul_(5)
        student.load_state_dict(tail.state_dict())
        student.weight[FORGOTTEN] += torch.randn(3, FEATURES)
    full, subset = rows_of(tail, []), rows_of(tail, ["weight", "bias"])
    assert torch.equal(full.label, subset.label)
    assert torch.equal(full.forgotten, subset.forgotten)
    assert subset.teacher.numel() == 0
    assert subset.logit_std == pytest.approx(float(full.teacher.std()), rel=1e-3)
    masked = MaskedKL(forget_mask(), 1.5, forget_logits_only=True)
    forget_only = ForgetOnlyKL(forget_mask(), 1.5)
    index = torch.arange(len(full))
    with torch.no_grad():
        logits = student(*full.features)
    loss, gradient = masked(logits, full.select(index))
    subset_loss, subset_gradient = forget_only(
        logits[:, FORGOTTEN].contiguous(), subset.select(index)
    )
    torch.testing.assert_close(subset_loss, loss)
    torch.testing.assert_close(subset_gradient, gradient[:, FORGOTTEN], rtol=1e-4, atol=1e-8)
    assert not gradient[:, ~forget_mask()].any()
    tail = ClassSubsetTail(student, ["weight", "bias"], torch.tensor(FORGOTTEN), trainable=True)
    score = masked.score(student, full)
    assert 0 < score[1] < 1
    assert forget_only.score(tail, subset) == pytest.approx(score, rel=1e-4, nan_ok=True)


def test_tiles_of_classes_give_what_all_classes_do() -> None:
    tail = nn.Linear(FEATURES, CLASSES)
    want = rows_of(tail, ["weight", "bias"])
    got = rows_of(tail, ["weight", "bias"], tile_classes=7, tile_logits=70)
    assert torch.equal(got.label, want.label)
    assert got.retained is not None
    assert want.retained is not None
    torch.testing.assert_close(got.retained.logsumexp, want.retained.logsumexp)
    torch.testing.assert_close(got.retained.max, want.retained.max)
    retained = tail(*want.features)[:, ~forget_mask()]
    torch.testing.assert_close(want.retained.logsumexp, retained.logsumexp(1))
    torch.testing.assert_close(want.retained.max, retained.amax(1))
    assert got.logit_std == pytest.approx(want.logit_std, rel=1e-4)


def test_teacher_logits_too_large_to_store_are_computed_again() -> None:
    tail = nn.Linear(FEATURES, CLASSES)
    stored = rows_of(tail, [])
    lazy = rows_of(tail, [], teacher_bytes=0, tile_logits=3 * CLASSES)
    assert lazy.teacher.numel() == 0
    masked = MaskedKL(forget_mask(), 1.0)
    score = masked.score(tail, stored)
    index = torch.tensor([5, 200, 0])
    want = stored.select(index).teacher
    with torch.no_grad():
        tail.weight.mul_(-1)  # the teacher is the tail as it was
    torch.testing.assert_close(lazy.select(index).teacher, want)
    assert torch.equal(lazy.label, stored.label)
    with torch.no_grad():
        tail.weight.mul_(-1)
    assert masked.score(tail, lazy) == pytest.approx(score, rel=1e-5, nan_ok=True)


def limited(forget: list[int], limits: MemoryLimits, **options: Any) -> ZeroShotUnlearner:
    """A run of the tiny model with other memory limits."""
    run = ZeroShotUnlearner(tiny(), forget, **QUICK | {"tail": "last"} | options)
    run.options.features = replace(run.options.features, limits=limits)
    return run


def test_a_fit_of_the_forgotten_logits_ends_where_one_of_all_does() -> None:
    options: dict[str, Any] = {"learning_rate": 1e-2, "input_shape": (3, 8, 8)}
    full = limited([1, 4], MemoryLimits(subset_above=10**9), **options).run()
    subset = limited([1, 4], MemoryLimits(subset_above=1), **options).run()
    assert_forgets(subset, [1, 4])
    before = tiny().get_parameter("fc2.weight")
    got, want = subset.get_parameter("fc2.weight"), full.get_parameter("fc2.weight")
    assert torch.equal(got[[0, 2, 3]], before[[0, 2, 3]])
    moved = (want - before)[[1, 4]]
    assert ((got - want)[[1, 4]].norm() / moved.norm()).item() < 0.02


@pytest.mark.parametrize("options", [{"objective": "differential"}, {"tail": 2}], ids=str)
def test_other_fits_train_all_logits_and_need_no_stored_teacher(options: Any) -> None:
    options = {"learning_rate": 1e-3, "input_shape": (3, 8, 8)} | options
    want = limited([1], MemoryLimits(subset_above=1), **options).run()
    got = limited([1], MemoryLimits(subset_above=1, teacher_bytes=0), **options).run()
    retained = [0, 2, 3, 4]
    for model in (want, got):  # a fit of the forgotten logits alone would leave these as they are
        assert not torch.equal(
            model.get_parameter("fc2.weight")[retained],
            tiny().get_parameter("fc2.weight")[retained],
        )
    before = tiny().get_parameter("fc2.weight")
    moved = want.get_parameter("fc2.weight") - before
    off = got.get_parameter("fc2.weight") - want.get_parameter("fc2.weight")
    assert moved.norm().item() > 0.1
    assert (off.norm() / moved.norm()).item() < 0.02

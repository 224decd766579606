"""Labelling rows: impressions and mixtures of them, with the original tail's answers."""

from __future__ import annotations

import torch
from feature_case import FORGET, case
from torch import Tensor, nn

from zsu_fast.training.teacher import Teacher, build_feature_set


def test_impressions_come_first_and_keep_their_labels() -> None:
    tail, features, rows = case()
    assert len(rows) == 212
    assert torch.equal(rows.features[0][:12], features)
    assert torch.equal(rows.label[:12], torch.arange(12) % 4)
    assert torch.equal(rows.teacher, tail(rows.features[0]))
    assert not rows.teacher.requires_grad


def test_mixtures_are_labelled_by_the_tail() -> None:
    tail, _, rows = case()
    assert torch.equal(rows.label[12:], tail(rows.features[0][12:]).argmax(1))
    assert torch.equal(rows.forgotten, FORGET[rows.label])


def test_mixtures_lie_between_and_beyond_impressions() -> None:
    _, features, rows = case(mixtures=2000)
    mean = features.mean(0)
    far = (rows.features[0][12:] - mean).norm(dim=1)
    near = (features - mean).norm(dim=1)
    assert float(far.max()) > 1.5 * float(near.max())
    assert float(far.min()) < 0.5 * float(near.min())
    assert (rows.features[0] >= 0).all()  # as no feature of an impression is below


def test_mixtures_of_signed_features_are_not_clamped() -> None:
    tail = nn.Linear(6, 4)
    features = torch.randn(12, 6)
    rows = build_feature_set(
        Teacher(tail, FORGET), (features,), torch.arange(12) % 4, 500, torch.Generator()
    )
    assert (rows.features[0][12:] < features.min()).any()


def test_every_second_mixture_has_a_forget_class_on_a_side() -> None:
    """One-hot features, one impression of the one forget class among 40."""
    count, forget = 40, torch.tensor([False] * 39 + [True])
    tail = nn.Linear(count, count)
    rows = build_feature_set(
        Teacher(tail, forget), (torch.eye(count) - 1,), torch.arange(count), 400, torch.Generator()
    )
    mixed = rows.features[0][count:]
    mean = (torch.eye(count) - 1).mean(0)
    direction = mixed - mean
    has = direction[:, -1] > 1e-5
    assert float(has.float().mean()) > 0.4


def test_all_crossing_values_are_mixed_alike() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a[:, :4] + b.mean((2, 3))

    features = (torch.rand(8, 6), torch.rand(8, 4, 3, 3))
    rows = build_feature_set(
        Teacher(Two(), FORGET), features, torch.arange(8) % 4, 50, torch.Generator()
    )
    assert [f.shape for f in rows.features] == [(58, 6), (58, 4, 3, 3)]
    same = (features[0], features[0].view(8, 6, 1, 1).expand(8, 6, 2, 2).contiguous())

    class Head(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a[:, :4] + b[:, :4, 0, 0]

    rows = build_feature_set(
        Teacher(Head(), FORGET), same, torch.arange(8) % 4, 50, torch.Generator()
    )
    assert torch.allclose(rows.features[0], rows.features[1][:, :, 1, 1], atol=1e-5)


def test_no_mixtures() -> None:
    tail, features, rows = case(mixtures=0)
    assert len(rows) == 12
    assert torch.equal(rows.features[0], features)
    assert torch.equal(rows.teacher, tail(features))


def test_rows_depend_on_the_generator_alone() -> None:
    torch.manual_seed(5)
    first = case(seed=1)
    torch.manual_seed(5)
    second = case(seed=1)
    torch.manual_seed(5)
    other = case(seed=2)
    assert torch.equal(first[2].features[0], second[2].features[0])
    assert not torch.equal(first[2].features[0], other[2].features[0])


def test_rows_without_the_impressions_themselves() -> None:
    tail, features = nn.Linear(6, 4), torch.rand(12, 6)
    made = build_feature_set(
        Teacher(tail, FORGET),
        (features,),
        torch.arange(12) % 4,
        100,
        torch.Generator(),
        impressions=False,
    )
    assert len(made) == 100
    assert torch.equal(made.label, made.teacher.argmax(1))
    assert not (made.features[0][:, None] == features).all(2).any()

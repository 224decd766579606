"""Feature sets: selection, sizes, lazily mixed rows, and which impressions are held out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from feature_case import FORGET, case
from torch import Tensor, nn

from zsu_fast import ArgumentError
from zsu_fast.training.features import (
    FeatureSet,
    FeatureSettings,
    MemoryLimits,
    held_out,
    logit_margin,
)
from zsu_fast.training.teacher import Teacher, build_feature_set


def test_selected_rows_belong_together() -> None:
    _, _, rows = case()
    index = torch.tensor([100, 3, 3])
    selected = rows.select(index)
    assert len(selected) == 3
    assert torch.equal(selected.features[0], rows.features[0][index])
    for name in ("teacher", "label", "forgotten"):
        assert torch.equal(getattr(selected, name), getattr(rows, name)[index])


@pytest.mark.parametrize(
    ("impressions", "classes", "count"),
    [(10, 10, 2048), (1000, 10, 4000), (1000, 1000, 12000), (1000, 0, 4000)],
)
def test_default_number_of_mixtures(impressions: int, classes: int, count: int) -> None:
    assert FeatureSettings().mixtures_for(impressions, classes) == count
    assert FeatureSettings(mixtures=7).mixtures_for(impressions, classes) == 7


@pytest.mark.parametrize(("classes", "times"), [(4, 2), (10, 2), (100, 4), (1000, 6)])
def test_default_margin_is_the_mean_logit_margin_times_a_factor_of_the_classes(
    classes: int, times: float
) -> None:
    label = torch.arange(12) % classes
    logits = torch.zeros(12, classes)
    logits[torch.arange(12), label] = torch.arange(12.0)
    mean = float(logit_margin(logits, label).mean())
    assert FeatureSettings().margin_for(mean, classes, False) == pytest.approx(times * 5.5)
    assert FeatureSettings().margin_for(mean, classes, True) == pytest.approx(2 * times * 5.5)
    assert FeatureSettings(margin=1.5).margin_for(mean, classes, False) == 1.5
    logits[torch.arange(12), label] = -5
    mean = float(logit_margin(logits, label).mean())
    assert FeatureSettings().margin_for(mean, classes, False) == 0


# --- rows mixed when they are selected -------------------------------------------------------


def stored_and_lazy(chunk_bytes: int = 2**25, tile_logits: int = 2**23) -> tuple[FeatureSet, ...]:
    """The same rows, of two tensors each, mixed at once and mixed when they are selected."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a) + b.mean((2, 3))

    tail, features = Two(), (torch.rand(12, 5), torch.randn(12, 4, 3, 3))
    sets = []
    for stored in (1024**3, 0):
        limits = MemoryLimits(
            feature_bytes=stored, chunk_bytes=chunk_bytes, tile_logits=tile_logits
        )
        generator, teacher = torch.Generator().manual_seed(4), Teacher(tail, FORGET, limits=limits)
        sets.append(build_feature_set(teacher, features, torch.arange(12) % 4, 300, generator))
    return tuple(sets)


def test_lazily_mixed_rows_have_the_same_bits() -> None:
    stored, lazy = stored_and_lazy()
    assert stored.mixup is None
    assert lazy.mixup is not None
    assert [len(f) for f in stored.features] == [312, 312]
    assert [len(f) for f in lazy.features] == [12, 12]  # only the impressions are stored
    assert len(stored) == len(lazy) == 312
    for index in (torch.arange(312), torch.tensor([311, 0, 7, 7, 150])):
        first, second = stored.select(index), lazy.select(index)
        for a, b in zip(first.features, second.features, strict=True):
            assert torch.equal(a, b)
        for name in ("teacher", "label", "forgotten"):
            assert torch.equal(getattr(first, name), getattr(second, name))
    assert (lazy.select(torch.arange(312)).features[0] >= 0).all()
    assert (lazy.select(torch.arange(312)).features[1] < 0).any()


def test_lazy_rows_start_with_the_impressions() -> None:
    _, lazy = stored_and_lazy()
    selected = lazy.select(torch.arange(12))
    assert all(torch.equal(a, b) for a, b in zip(selected.features, lazy.features, strict=True))
    assert torch.equal(selected.label, torch.arange(12) % 4)


@pytest.mark.parametrize("room", [1, 1000, 10**9])
def test_chunks_are_bounded_and_in_order(room: int) -> None:
    row = 4 * (5 + 4 * 3 * 3)
    for rows in stored_and_lazy(chunk_bytes=room):
        chunks = list(rows.chunks())
        sizes = [len(index) for index in chunks]
        assert max(sizes) <= max(1, room // row)
        assert sizes == sorted(sizes, reverse=True)
        assert torch.equal(torch.cat(chunks), torch.arange(len(rows)))
    for rows in stored_and_lazy(chunk_bytes=room, tile_logits=50):
        assert max(len(index) for index in rows.chunks(classes=10)) <= 5


@pytest.mark.parametrize("lazy", [False, True])
def test_parts_are_all_rows_and_views_if_they_are_stored(lazy: bool) -> None:
    rows = stored_and_lazy(chunk_bytes=20_000)[lazy]
    parts = list(rows.parts())
    assert len(parts) > 1
    for index, part in zip(rows.chunks(), parts, strict=True):
        selected = rows.select(index)
        for got, want in zip(part.features, selected.features, strict=True):
            assert torch.equal(got, want)
        for name in ("teacher", "label", "forgotten"):
            assert torch.equal(getattr(part, name), getattr(selected, name))
    memory = rows.features[0].untyped_storage().data_ptr()
    shared = parts[1].features[0].untyped_storage().data_ptr() == memory
    assert shared is not lazy


# --- which impressions are held out ----------------------------------------------------------


def test_one_in_four_of_each_class_is_held_out() -> None:
    label = torch.tensor([0] * 8 + [1] * 4 + [2] * 3 + [3] + [5] * 11)  # none of class 4
    held = held_out(label)
    assert held.dtype == torch.bool
    assert torch.bincount(label[held], minlength=6).tolist() == [2, 1, 0, 0, 0, 2]
    assert held[:8].nonzero()[:, 0].tolist() == [3, 7]


def test_held_out_whatever_the_order() -> None:
    label = torch.arange(40) % 5
    shuffled = label[torch.randperm(40)]
    assert torch.bincount(label[held_out(label)]).tolist() == [2] * 5
    assert torch.bincount(shuffled[held_out(shuffled)]).tolist() == [2] * 5


@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_few_impressions_are_not_held_out(per_class: int) -> None:
    assert not held_out(torch.arange(40).repeat_interleave(per_class)).any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("mixtures", -1), ("mixtures", 0.5), ("mixtures", True), ("margin", -0.1), ("margin", 10**30),
     ("margin", float("nan")), ("margin", float("inf")), ("margin", "x"), ("margin", True)],
)  # fmt: skip
def test_refused_row_settings(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: got {value!r}"):
        FeatureSettings(**{name: value})


def test_selected_rows_keep_the_layout_of_all() -> None:
    features = torch.randn(6, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    label = torch.arange(6)
    rows = FeatureSet((features, features.contiguous()), torch.randn(6, 2), label, label > 2)
    chosen = rows.select(torch.tensor([4, 0, 4])).features
    assert chosen[0].is_contiguous(memory_format=torch.channels_last)
    assert chosen[1].is_contiguous()
    assert all(torch.equal(part, features[[4, 0, 4]]) for part in chosen)

"""The rows that the tail learns from, and the two objectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsu_fast import ArgumentError
from zsu_fast.training.features import FeatureSet, FeatureSettings, build_feature_set, held_out
from zsu_fast.training.losses import Differential, MaskedKL, check_objective, make_objective

FORGET = torch.tensor([False, True, False, True])


def case(
    count: int = 12, mixtures: int = 200, seed: int = 0
) -> tuple[nn.Module, Tensor, FeatureSet]:
    """A linear tail, the features of impressions, and rows made of them."""
    tail = nn.Linear(6, 4)
    features = torch.rand(count, 6) + 0.1
    label = torch.arange(count) % 4
    generator = torch.Generator().manual_seed(seed)
    return tail, features, build_feature_set(tail, (features,), label, FORGET, mixtures, generator)


# --- rows ------------------------------------------------------------------------------------


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
        tail, (features,), torch.arange(12) % 4, FORGET, 500, torch.Generator()
    )
    assert (rows.features[0][12:] < features.min()).any()


def test_every_second_mixture_has_a_forget_class_on_a_side() -> None:
    """One-hot features, one impression of the one forget class among 40."""
    count, forget = 40, torch.tensor([False] * 39 + [True])
    tail = nn.Linear(count, count)
    rows = build_feature_set(
        tail, (torch.eye(count) - 1,), torch.arange(count), forget, 400, torch.Generator()
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
    rows = build_feature_set(Two(), features, torch.arange(8) % 4, FORGET, 50, torch.Generator())
    assert [f.shape for f in rows.features] == [(58, 6), (58, 4, 3, 3)]
    same = (features[0], features[0].view(8, 6, 1, 1).expand(8, 6, 2, 2).contiguous())

    class Head(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a[:, :4] + b[:, :4, 0, 0]

    rows = build_feature_set(Head(), same, torch.arange(8) % 4, FORGET, 50, torch.Generator())
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


def test_picked_rows_belong_together() -> None:
    _, _, rows = case()
    index = torch.tensor([100, 3, 3])
    picked = rows.select(index)
    assert len(picked) == 3
    assert torch.equal(picked.features[0], rows.features[0][index])
    for name in ("teacher", "label", "forgotten"):
        assert torch.equal(getattr(picked, name), getattr(rows, name)[index])


@pytest.mark.parametrize(
    ("impressions", "classes", "count"),
    [(10, 10, 2048), (1000, 10, 4000), (1000, 1000, 12000), (1000, 0, 4000)],
)
def test_default_number_of_mixtures(impressions: int, classes: int, count: int) -> None:
    assert FeatureSettings().count(impressions, classes) == count
    assert FeatureSettings(mixtures=7).count(impressions, classes) == 7


@pytest.mark.parametrize(("classes", "times"), [(4, 2), (10, 2), (100, 4), (1000, 6)])
def test_default_margin_is_the_mean_lead_times_a_factor_of_the_classes(
    classes: int, times: float
) -> None:
    label = torch.arange(12) % classes
    logits = torch.zeros(12, classes)
    logits[torch.arange(12), label] = torch.arange(12.0)
    assert FeatureSettings().margin_for(logits, label) == pytest.approx(times * 5.5)
    assert FeatureSettings(margin=1.5).margin_for(logits, label) == 1.5
    logits[torch.arange(12), label] = -5
    assert FeatureSettings().margin_for(logits, label) == 0


# --- rows mixed when they are picked ---------------------------------------------------------


def kept_and_lazy(monkeypatch: pytest.MonkeyPatch) -> tuple[FeatureSet, FeatureSet]:
    """The same rows, of two tensors each, made at once and made when they are picked."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.fc(a) + b.mean((2, 3))

    tail, features = Two(), (torch.rand(12, 5), torch.randn(12, 4, 3, 3))
    made = []
    for kept in (1024**3, 0):
        monkeypatch.setattr("zsu_fast.training.features._KEPT", kept)
        generator = torch.Generator().manual_seed(4)
        made.append(build_feature_set(tail, features, torch.arange(12) % 4, FORGET, 300, generator))
    return made[0], made[1]


def test_lazily_mixed_rows_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, lazy = kept_and_lazy(monkeypatch)
    assert kept.mixing is None
    assert lazy.mixing is not None
    assert [len(f) for f in kept.features] == [312, 312]
    assert [len(f) for f in lazy.features] == [12, 12]  # no more than the impressions is held
    assert len(kept) == len(lazy) == 312
    for index in (torch.arange(312), torch.tensor([311, 0, 7, 7, 150])):
        first, second = kept.select(index), lazy.select(index)
        for a, b in zip(first.features, second.features, strict=True):
            assert torch.equal(a, b)
        for name in ("teacher", "label", "forgotten"):
            assert torch.equal(getattr(first, name), getattr(second, name))
    assert (lazy.select(torch.arange(312)).features[0] >= 0).all()
    assert (lazy.select(torch.arange(312)).features[1] < 0).any()


def test_lazy_rows_start_with_the_impressions(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lazy = kept_and_lazy(monkeypatch)
    picked = lazy.select(torch.arange(12))
    assert all(torch.equal(a, b) for a, b in zip(picked.features, lazy.features, strict=True))
    assert torch.equal(picked.label, torch.arange(12) % 4)


@pytest.mark.parametrize("room", [1, 1000, 10**9])
def test_chunks_are_bounded_and_in_order(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    row = 4 * (5 + 4 * 3 * 3)
    for rows in kept_and_lazy(monkeypatch):
        monkeypatch.setattr("zsu_fast.training.features._CHUNK", room)
        chunks = list(rows.chunks())
        sizes = [len(index) for index in chunks]
        assert max(sizes) <= max(1, room // row)
        assert sizes == sorted(sizes, reverse=True)
        assert torch.equal(torch.cat(chunks), torch.arange(len(rows)))
        monkeypatch.setattr("zsu_fast.training.class_subset.TILE_VALUES", 50)
        assert max(len(index) for index in rows.chunks(classes=10)) <= 5


def test_rows_without_the_impressions_themselves() -> None:
    tail, features = nn.Linear(6, 4), torch.rand(12, 6)
    made = build_feature_set(
        tail, (features,), torch.arange(12) % 4, FORGET, 100, torch.Generator(), impressions=False
    )
    assert len(made) == 100
    assert torch.equal(made.label, made.teacher.argmax(1))
    assert not (made.features[0][:, None] == features).all(2).any()


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


# --- objectives ------------------------------------------------------------------------------


def test_differential_is_a_mean_over_each_side() -> None:
    _, _, rows = case()
    logits = torch.randn(len(rows), 4, requires_grad=True)
    ce = F.cross_entropy(logits, rows.label, reduction="none")
    want = -0.7 * ce[rows.forgotten].mean() + 0.2 * ce[~rows.forgotten].mean()
    loss, dlogits = Differential(0.7, 0.2)(logits.detach(), rows)
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)
    assert torch.allclose(dlogits, torch.autograd.grad(want, logits)[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("side", [True, False])
def test_differential_on_rows_of_one_side(side: bool) -> None:
    _, _, rows = case()
    rows = rows.select((rows.forgotten == side).nonzero()[:, 0])
    loss, grad = Differential()(torch.randn(len(rows), 4), rows)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert (float(loss) < 0) == side


def test_differential_descends_on_retain_and_ascends_on_forget() -> None:
    _, _, rows = case()
    _, grad = Differential()(rows.teacher, rows)
    own = grad.gather(1, rows.label[:, None])[:, 0]
    assert (own[rows.forgotten] > 0).all()  # a step against the gradient lowers that logit
    assert (own[~rows.forgotten] < 0).all()


def test_masked_is_the_mean_divergence_with_the_margin() -> None:
    _, _, rows = case()
    logits = torch.randn(len(rows), 4, requires_grad=True)
    q = rows.teacher.masked_fill(FORGET, -torch.inf).softmax(1)
    shifted = (logits + 2.0 * FORGET).log_softmax(1)
    want = F.kl_div(shifted, q, reduction="batchmean")
    loss, dlogits = MaskedKL(FORGET, 2.0)(logits.detach(), rows)
    assert float(loss) == pytest.approx(float(want.detach()), rel=1e-5)
    assert torch.allclose(dlogits, torch.autograd.grad(want, logits)[0], rtol=1e-4, atol=1e-7)


def test_masked_is_lowest_where_forgotten_logits_are_low() -> None:
    _, _, rows = case()
    validation_loss = MaskedKL(FORGET, 3.0)
    drops = [
        validation_loss.divergence(rows.teacher - d * FORGET.float(), rows) for d in (0, 3, 9, 30)
    ]
    assert drops == sorted(drops, reverse=True)
    assert float(drops[-1]) == pytest.approx(0, abs=1e-5)


def test_the_seam() -> None:
    validation_loss = MaskedKL(FORGET, 1.0)
    assert make_objective("masked", (0.9, 0.1), validation_loss) is validation_loss
    made = make_objective("differential", (0.8, 0.2), validation_loss)
    assert isinstance(made, Differential)
    assert (made.weight_forget, made.weight_retain) == (0.8, 0.2)


@pytest.mark.parametrize("name", ["MaskedKL", "", None, 3])
def test_refused_objectives(name: Any) -> None:
    with pytest.raises(ArgumentError, match=r"objective: got .* Pass 'masked' or 'differential'"):
        check_objective(name, (0.9, 0.1))


@pytest.mark.parametrize("weights", [(), (1,), (1, 2, 3), (0, 1), (1, -1), "ab", None, 1.0,
                                     (float("nan"), 1), (1, float("inf"))])  # fmt: skip
def test_refused_weights(weights: Any) -> None:
    with pytest.raises(ArgumentError, match="weights: got"):
        check_objective("masked", weights)

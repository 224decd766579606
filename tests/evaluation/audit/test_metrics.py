"""The metrics themselves, against values known by hand or from other code."""

from __future__ import annotations

import math

import pytest
import torch

from zsu_fast.evaluation.audit import features, outputs


def test_cka_is_one_for_rotations_and_small_for_noise() -> None:
    x = torch.randn(500, 20)
    turn, _ = torch.linalg.qr(torch.randn(20, 20))
    assert features.linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1)
    assert features.linear_cka(x, torch.randn(500, 20)) < 0.1
    assert features.linear_cka(x[:2], x[:2]) is None
    assert features.linear_cka(x, torch.ones(500, 3)) is None
    wide = torch.randn(30, 400)  # fewer rows than columns: the other formula
    y = torch.randn(30, 5)
    a, b = (wide - wide.mean(0)).double(), (y - y.mean(0)).double()
    expected = (b.T @ a).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert features.linear_cka(wide, y) == pytest.approx(float(expected))


def test_knn_votes_among_the_nearest() -> None:
    train = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9], [0, 1.1]])
    labels = torch.tensor([0, 0, 1, 1, 2])
    test = torch.tensor([[2.0, 0.1], [0.1, 3]])
    assert features.knn_predictions(train, labels, test, 3, k=2).tolist() == [0, 1]
    assert features.knn_predictions(train, labels, test, 3, k=1).tolist()[0] == 0
    assert len(features.knn_predictions(train, labels, test, 3, k=99)) == 2


def test_auc_counts_pairs_and_halves_ties() -> None:
    inside, outside = torch.tensor([3.0, 1, 2]), torch.tensor([0.0, 2, 1])
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert outputs.auc(inside, outside) == pytest.approx(float(sum(pairs)) / 9)
    assert outputs.auc(torch.ones(4), torch.ones(7)) == 0.5
    assert outputs.auc(torch.ones(4), torch.zeros(7)) == 1


def test_membership_scores_survive_a_mask() -> None:
    logits = torch.tensor([[1.0, 2, -torch.inf], [0, 0, -torch.inf]])
    found = outputs.membership_scores(logits, torch.tensor([1, 2]))
    assert all(bool(v.isfinite().all()) for v in found.values())
    assert found["entropy"][1] == pytest.approx(-math.log(2))
    assert found["loss"][1] == -1e4
    assert found["confidence"][0] == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_model_that_memorised_its_images_gives_them_away() -> None:
    labels = torch.arange(200) % 4
    sure = torch.nn.functional.one_hot(labels, 4) * 9.0
    unsure = torch.randn(200, 4)
    areas = outputs.membership_attack(sure, labels, unsure, labels)
    assert min(areas.values()) > 0.95


def test_divergences_by_hand() -> None:
    p = torch.tensor([[0.0, math.log(3)]])  # 1/4, 3/4
    q = torch.tensor([[0.0, 0.0]])
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert outputs.kl(p, q) == pytest.approx(expected, rel=1e-5)
    assert outputs.kl(p, p) == pytest.approx(0, abs=1e-7)
    assert outputs.activation_distance(p, q) == pytest.approx(math.sqrt(2) / 4)
    assert outputs.js(p, q) == pytest.approx(outputs.js(q, p))
    apart = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert outputs.js(*apart) == pytest.approx(math.log(2))
    assert outputs.kl(*apart) == pytest.approx(-math.log(1e-12), rel=1e-4)
    assert outputs.activation_distance(*apart) == pytest.approx(math.sqrt(2))


def test_feature_drift() -> None:
    x = torch.randn(2000, 30)
    assert features.feature_drift(x, x) == 0
    assert features.feature_drift(torch.randn(2000, 30), x) == pytest.approx(2, abs=0.1)
    assert features.feature_drift(torch.zeros(5, 3), torch.zeros(5, 4)) is None


def test_probe_finds_what_is_linear_and_nothing_in_noise() -> None:
    labels = torch.arange(600) % 3
    x = torch.randn(600, 10)
    informative = torch.cat([x, 3.0 * torch.nn.functional.one_hot(labels, 3)], 1)
    half = torch.arange(600) < 300

    def accuracy(rows: torch.Tensor) -> float:
        answers = features.probe_predictions(rows[half], labels[half], rows[~half], 3)
        return float((answers == labels[~half]).float().mean())

    assert accuracy(informative) > 0.95
    assert accuracy(x) < 0.5


def test_probe_agrees_with_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    labels = torch.arange(400) % 4
    x = torch.randn(400, 12) + 0.8 * torch.nn.functional.one_hot(labels, 12)
    x = (x - x.mean(0)) / x.std(0)
    ours = features.probe_predictions(x, labels, x, 4)
    # sklearn: sum of losses + ||w||^2 / (2 C); ours: mean of losses + 1e-3 ||w||^2
    theirs = linear_model.LogisticRegression(C=1 / (2 * 1e-3 * 400), max_iter=200)
    expected = theirs.fit(x.numpy(), labels.numpy()).predict(x.numpy())
    assert float((ours.numpy() == expected).mean()) > 0.99


def test_the_adapted_layer_is_the_ridge_solution() -> None:
    draw = torch.Generator().manual_seed(0)
    f, z = torch.randn(40, 7, generator=draw) + 2, torch.randn(40, 3, generator=draw)
    w, test = torch.randn(3, 7, generator=draw), torch.randn(500, 7, generator=draw) + 2
    f, z, w, test = f.double(), z.double(), w.double(), test.double()
    # the same problem as least squares: a column of ones, and rows that pull to the weights before
    root = (0.1 * 40 * f.var(0, correction=0).mean()).sqrt()
    pull = torch.cat([root * torch.eye(7), torch.zeros(7, 1)], 1)
    left = torch.cat([torch.cat([f, torch.ones(40, 1)], 1), pull])
    solution = torch.linalg.lstsq(left, torch.cat([z, root * w.T])).solution
    expected = (torch.cat([test, torch.ones(500, 1)], 1) @ solution).argmax(1)
    assert torch.equal(features.adapted_predictions(f, z, test, w), expected)


def test_the_adapted_layer_undoes_a_shift_and_finds_nothing_in_noise() -> None:
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(900, 20, generator=draw), torch.randn(5, 20, generator=draw)
    logits = x @ w.T + 3 * torch.randn(5, generator=draw)
    shifted, noise = x + 50, torch.randn(900, 20, generator=draw)

    def agreement(rows: torch.Tensor) -> float:
        found = features.adapted_predictions(rows[:300], logits[:300], rows[300:], w)
        return float((found == logits[300:].argmax(1)).float().mean())

    assert agreement(x) == 1
    assert agreement(shifted) > 0.99
    assert agreement(noise) < 0.5
    constant = torch.ones(900, 20)
    found = features.adapted_predictions(constant[:300], logits[:300], constant[300:], w)
    assert found.unique().tolist() == [int(logits[:300].mean(0).argmax())]


def test_feature_maps_are_averaged_over_positions() -> None:
    maps = torch.randn(2, 3, 2, 2)
    assert torch.allclose(features.mean_over_positions(maps.flatten(1), 3), maps.mean((2, 3)))
    assert features.mean_over_positions(maps.flatten(1), 12).shape == (2, 12)
    assert features.mean_over_positions(maps.flatten(1), 5).shape == (2, 12)


def test_halves_divide_each_class() -> None:
    labels = torch.tensor([2, 0, 2, 2, 0, 1, 2])
    a, b = features.split_in_half(labels)
    assert (a ^ b).all()
    for half in (a, b):
        assert torch.bincount(labels[half], minlength=3).tolist() in ([1, 1, 2], [1, 0, 2])

"""Changes of the last layer are distinguished: masks, shuffles, noise, training."""

from __future__ import annotations

import pytest
import torch

from zsu_fast.evaluation.audit.weights import compare_last_layers, erasure_cost


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(8, 41, generator=draw), torch.randn(8, 40, generator=draw)


def test_erasure_cost_by_hand() -> None:
    forget = torch.arange(10) < 3
    # one feature per class: rows share only the mean that is subtracted, k / (C - 1) / (C - k)
    assert erasure_cost(torch.eye(10), forget, None) == pytest.approx(3 / 9 / 7)
    together = torch.eye(10)
    together[3:] = together[0]  # all retained classes read what a forgotten one reads
    assert erasure_cost(together, forget, None) == pytest.approx(1)
    assert erasure_cost(torch.randn(10, 3), forget, None) == pytest.approx(1)
    apart = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    assert erasure_cost(apart, torch.tensor([True, True, False, False]), None) == 0


def test_erasure_cost_is_what_the_forgotten_logits_explain_of_the_others() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 12, generator=draw).double()
    features = (torch.randn(50, 12, generator=draw) @ torch.randn(12, 12, generator=draw)).double()
    forget = torch.tensor([True] * 3 + [False] * 5)
    covariance = torch.cov(features.T, correction=0)
    covariance += 0.3 * covariance.diagonal().mean() * torch.eye(12)
    rows = weight - weight.mean(0)
    logits = rows @ covariance @ rows.T  # their covariance
    cross, own = logits[~forget][:, forget], logits[forget][:, forget]
    expected = (cross @ own.inverse() @ cross.T).trace() / logits[~forget][:, ~forget].trace()
    assert 0.1 < expected < 0.9
    assert erasure_cost(weight, forget, features + 5) == pytest.approx(float(expected))
    assert erasure_cost(weight, forget, None) != pytest.approx(float(expected), rel=0.01)


def test_last_layer_is_recognised() -> None:
    old, features = rows()

    def kind(new: torch.Tensor, hidden: bool = False) -> str:
        return compare_last_layers(new, old, [1, 2], hidden, features).change

    assert kind(old.clone()) == "same"
    assert kind(old.clone(), hidden=True) == "masked"
    bias = old.clone()
    bias[1:3, -1] = -1e9
    assert kind(bias) == "masked"
    others = old.clone()
    others[[0, 3, 4, 5, 6, 7], -1] += 1e9
    assert kind(others) == "masked"
    assert kind(old[torch.arange(8).roll(1)]) == "shuffled"
    swapped = old.clone()
    swapped[1], swapped[5] = old[5], old[1]
    assert kind(swapped) == "shuffled"
    assert kind(old + torch.cat([torch.randn(8, 40), torch.zeros(8, 1)], 1)) == "noise"
    trained = old.clone()
    trained[:, :-1] += torch.randn(8, 8) @ features
    assert kind(trained) == "trained"
    forgotten = old.clone()
    forgotten[1:3, :-1] += torch.randn(2, 8) @ features
    assert kind(forgotten) == "trained"
    emptied = old.clone()
    emptied[1:3, :-1] = 0
    assert kind(emptied) == "masked"
    noisy = old.clone()
    noisy[1:3, :-1] += torch.randn(2, 40)
    assert kind(noisy) == "noise"
    assert compare_last_layers(None, old, [1], False, features).change == "unknown"

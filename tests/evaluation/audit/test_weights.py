"""Changes of the last layer are distinguished: masks, shuffles, noise, training."""

from __future__ import annotations

import torch

from zsu_fast.evaluation.audit.weights import compare_last_layers


def rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(8, 41, generator=draw), torch.randn(8, 40, generator=draw)


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

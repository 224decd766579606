"""Of many classes, the forgotten and a sample of the retained ones get impressions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import QUICK, assert_forgets, tiny
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ZeroShotUnlearner
from zsu_fast.errors import ArgumentError
from zsu_fast.synthesis import class_sampling
from zsu_fast.synthesis.class_sampling import nearness, sample_classes, sample_size


def test_a_sample_has_the_forgotten_the_nearest_and_some_at_random() -> None:
    weight = torch.randn(200, 64)
    for near, forgotten in ((50, 3), (51, 4), (52, 3)):
        weight[near] = 3 * weight[forgotten] + 0.01 * torch.randn(64)  # by direction, not by length
    retained = [c for c in range(200) if c not in (3, 4)]
    chosen = sample_classes(weight, [3, 4], retained, 6, seed=0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 8
    assert {3, 4, 50, 51, 52} <= set(chosen)
    assert chosen == sample_classes(weight, [3, 4], retained, 6, seed=0)
    assert chosen != sample_classes(weight, [3, 4], retained, 6, seed=1)


def test_nearness_is_the_same_in_tiles() -> None:
    weight, others = torch.randn(50, 8, 2, 2), torch.arange(5, 50)
    want = nearness(weight, [0, 1], others)
    tiled = nearness(weight, [0, 1], others, tile_values=100)
    torch.testing.assert_close(tiled, want)
    flat = weight.flatten(1) - weight.flatten(1).mean(0)
    cosines = nn.functional.cosine_similarity(flat[others][:, None], flat[None, :2], dim=2)
    torch.testing.assert_close(want, cosines.amax(1))


def test_a_sample_as_large_as_all_is_all() -> None:
    assert sample_classes(None, [1], [0, 2, 3], 3, seed=0) == [0, 1, 2, 3]


def test_only_very_many_classes_are_sampled_by_default() -> None:
    assert sample_size(4096, None) == 4096
    assert sample_size(4097, None) == 1024
    assert sample_size(100_000, 2000) == 2000
    assert sample_size(5, 2000) == 5


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "8"])
def test_a_bad_sample_size_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="retain_sample"):
        ZeroShotUnlearner(tiny(), [0], retain_sample=value)


def test_a_run_makes_impressions_of_the_sample_alone_and_says_so() -> None:
    run = ZeroShotUnlearner(tiny(), [1], retain_sample=2, input_shape=(3, 8, 8), **QUICK)
    result = run.run()
    assert run.impressions is not None
    made = run.impressions.labels.unique().tolist()
    assert 1 in made
    assert len(made) == 3
    recorded = run.record.impressions
    assert recorded["classes"] == 3
    assert recorded["rule"] == class_sampling.NEAREST
    assert not [note for note in run.record.warnings if "no impression reached" in note]
    assert_forgets(result, [1])
    whole = ZeroShotUnlearner(tiny(), [1], input_shape=(3, 8, 8), **QUICK)
    assert whole.active_classes == [0, 1, 2, 3, 4]
    assert whole.class_rule == class_sampling.ALL


def test_without_weights_per_class_the_sample_is_random_and_says_so() -> None:
    class Summed(nn.Module):  # two layers' halves of the logits
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(192, 3), nn.Linear(192, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x.flatten(1)), self.two(x.flatten(1))], 1)

    run = ZeroShotUnlearner(Summed(), [5], retain_sample=2, input_shape=(3, 8, 8), progress=False)
    assert len(run.active_classes) == 3
    assert run.class_rule == class_sampling.RANDOM


def test_impressions_given_with_a_sample_need_the_forgotten_and_one_more() -> None:
    made = zsu_fast.synthesize(
        tiny(), classes=[0, 1], per_class=8, input_shape=(3, 8, 8), progress=False
    )
    options: dict[str, Any] = {"impressions": made, "input_shape": (3, 8, 8), **QUICK}
    assert_forgets(ZeroShotUnlearner(tiny(), [1], retain_sample=2, **options).run(), [1])
    for forget, sample in (([1], None), ([2], 2), ([0, 1], 2)):
        with pytest.raises(ArgumentError, match="impressions"):
            ZeroShotUnlearner(tiny(), forget, retain_sample=sample, **options)

"""Many classes: which get impressions, and that nothing grows with rows times classes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import QUICK, SPEC, assert_forgets, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import zsu_fast
from zsu_fast import ZeroShotUnlearner
from zsu_fast.errors import ArgumentError
from zsu_fast.synthesis import class_sampling as sampling
from zsu_fast.synthesis.ascent_settings import BatchLimits
from zsu_fast.synthesis.synthesize import batch_rows
from zsu_fast.training.features import MemoryLimits


class Many(nn.Module):
    """float [N, 3, 8, 8] -> [N, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU())
        self.fc = nn.Linear(16, classes)
        self.input_spec = SPEC
        nn.init.normal_(self.trunk[1].weight, std=0.1)
        nn.init.normal_(self.fc.weight, std=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x))


# --- which classes ---------------------------------------------------------------------------


def test_a_sample_has_the_forgotten_the_nearest_and_some_at_random() -> None:
    weight = torch.randn(200, 64)
    for near, forgotten in ((50, 3), (51, 4), (52, 3)):
        weight[near] = 3 * weight[forgotten] + 0.01 * torch.randn(64)  # by direction, not by length
    retained = [c for c in range(200) if c not in (3, 4)]
    chosen = sampling.sample_classes(weight, [3, 4], retained, 6, seed=0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 8
    assert {3, 4, 50, 51, 52} <= set(chosen)
    assert chosen == sampling.sample_classes(weight, [3, 4], retained, 6, seed=0)
    assert chosen != sampling.sample_classes(weight, [3, 4], retained, 6, seed=1)


def test_nearness_is_the_same_in_tiles() -> None:
    weight, others = torch.randn(50, 8, 2, 2), torch.arange(5, 50)
    want = sampling.nearness(weight, [0, 1], others)
    tiled = sampling.nearness(weight, [0, 1], others, tile_values=100)
    torch.testing.assert_close(tiled, want)
    flat = weight.flatten(1) - weight.flatten(1).mean(0)
    cosines = nn.functional.cosine_similarity(flat[others][:, None], flat[None, :2], dim=2)
    torch.testing.assert_close(want, cosines.amax(1))


def test_a_sample_as_large_as_all_is_all() -> None:
    assert sampling.sample_classes(None, [1], [0, 2, 3], 3, seed=0) == [0, 1, 2, 3]


def test_only_very_many_classes_are_sampled_by_default() -> None:
    assert sampling.sample_size(4096, None) == 4096
    assert sampling.sample_size(4097, None) == 1024
    assert sampling.sample_size(100_000, 2000) == 2000
    assert sampling.sample_size(5, 2000) == 5


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
    assert recorded["rule"] == sampling.NEAREST
    assert not [note for note in run.record.warnings if "no impression reached" in note]
    assert_forgets(result, [1])
    whole = ZeroShotUnlearner(tiny(), [1], input_shape=(3, 8, 8), **QUICK)
    assert whole.active_classes == [0, 1, 2, 3, 4]
    assert whole.class_rule == sampling.ALL


def test_without_weights_per_class_the_sample_is_random_and_says_so() -> None:
    class Summed(nn.Module):  # two layers' halves of the logits
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(192, 3), nn.Linear(192, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.one(x.flatten(1)), self.two(x.flatten(1))], 1)

    run = ZeroShotUnlearner(Summed(), [5], retain_sample=2, input_shape=(3, 8, 8), progress=False)
    assert len(run.active_classes) == 3
    assert run.class_rule == sampling.RANDOM


def test_impressions_given_with_a_sample_need_the_forgotten_and_one_more() -> None:
    made = zsu_fast.synthesize(
        tiny(), classes=[0, 1], per_class=8, input_shape=(3, 8, 8), progress=False
    )
    options: dict[str, Any] = {"impressions": made, "input_shape": (3, 8, 8), **QUICK}
    assert_forgets(ZeroShotUnlearner(tiny(), [1], retain_sample=2, **options).run(), [1])
    for forget, sample in (([1], None), ([2], 2), ([0, 1], 2)):
        with pytest.raises(ArgumentError, match="impressions"):
            ZeroShotUnlearner(tiny(), forget, retain_sample=sample, **options)


# --- memory ----------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation returns, weights aside, in elements."""

    def __init__(self, weights: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights, self.most = weights, 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor) and tuple(item.shape) not in self.weights:
                self.most = max(self.most, item.numel())
        return out


@pytest.mark.parametrize("subset", [True, False])
def test_no_tensor_has_rows_times_classes(subset: bool) -> None:
    classes = 3000
    model = Many(classes).eval()
    run = ZeroShotUnlearner(
        model, [7, 8], retain_sample=30, impressions_per_class=4, mixtures=1000, steps=5, batch=16,
        max_steps=30, restarts=0, precision="float32", progress=False, tail="last",
    )  # fmt: skip
    limits = MemoryLimits(
        tile_logits=32 * classes, tile_classes=1000, teacher_bytes=0,
        subset_above=256 if subset else 10**9,
    )  # fmt: skip
    run.options.features = replace(run.options.features, limits=limits)
    run.options.ascent = replace(run.options.ascent, limits=BatchLimits(logits=16 * classes))
    weights = {tuple(p.shape) for p in model.parameters()} | {(16, classes)}
    with Largest(weights) as seen:
        run.synthesise()
        run.split()
        run.fit()
    assert len(run.active_classes) == 32
    assert seen.most <= 32 * classes  # a tile; 128 impressions alone would take four times that
    assert run.result is not None
    assert run.result.history[-1].step == 5


def test_few_rows_ascend_at_once_where_classes_are_many() -> None:
    run = ZeroShotUnlearner(Many(64), [0], progress=False)
    from zsu_fast.synthesis.space import input_space

    space = input_space(run.work, run.spec, "float32")
    wide = batch_rows(space)[1]
    assert wide > 20
    assert batch_rows(space, BatchLimits(logits=20 * 64)) == (80, 20)


def test_few_rows_ascend_at_once_where_they_fill_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ZeroShotUnlearner(Many(64), [0], progress=False)
    from zsu_fast.synthesis.space import input_space

    space = input_space(run.work, run.spec, "float32")
    weights = sum(p.nbytes for p in run.work.module.parameters())
    for row, cache, rows in (
        (weights // 12, 30 * (weights // 12), 30),
        (weights // 12, 0, 12),  # no less than the weights that are read for them
        (weights, 0, 8),
    ):
        monkeypatch.setattr("zsu_fast.runtime.memory.bytes_per_row", lambda *_, row=row: row)
        assert batch_rows(space, BatchLimits(cache_bytes=cache))[1] == rows

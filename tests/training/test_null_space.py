"""Deep forgetting's terms in the null space of the retained classes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import FEW_ROWS, FORGET, SPEC, assert_forgets, deep_run, tiny
from torch import nn

from zsu_fast import fit_stage
from zsu_fast.models.input_spec import noise_images
from zsu_fast.runtime.progress import Event
from zsu_fast.training.deep import deep, losses
from zsu_fast.training.deep.null_space import NullSpace


def a_null_space(
    count: int = 50, dead: bool = False
) -> tuple[NullSpace, torch.Tensor, torch.Tensor]:
    """That of three classes; features [count, 8], and the classes' weights."""
    torch.manual_seed(0)
    features = torch.randn(count, 8) * torch.arange(1, 9)
    if dead:
        features[:, 2] = 0.0
    weight = torch.randn(3, 8)
    return NullSpace(weight, features), features, weight


def test_differences_of_retained_logits_do_not_see_the_null_space() -> None:
    space, features, weight = a_null_space()
    inside = space.project(features)
    assert torch.allclose(inside @ (weight - weight.mean(0)).T, torch.zeros(50, 3), atol=1e-4)
    assert torch.linalg.matrix_rank(inside) == 6  # of eight; three classes have two differences
    torch.testing.assert_close(space.project(inside), inside)


def test_components_are_the_largest_in_the_null_space_and_not_correlated() -> None:
    space, features, _ = a_null_space()
    scene = torch.arange(50) < 40
    found = space.components(features, scene, 3)
    assert found.shape == (50, 3)
    of_scenes = found[scene]
    assert torch.allclose(of_scenes.mean(0), torch.zeros(3), atol=1e-4)
    variances = torch.linalg.svdvals(space.project(features[scene] - features[scene].mean(0)))
    torch.testing.assert_close(of_scenes.norm(dim=0), variances[:3])
    correlation = torch.corrcoef(of_scenes.T)
    assert torch.allclose(correlation, torch.eye(3), atol=1e-4)
    assert space.components(features, scene, 30).shape == (50, 6)


@pytest.mark.parametrize("dead", [False, True], ids=["alive", "a dead feature"])
def test_the_variance_and_its_gradient_are_those_of_autograd(dead: bool) -> None:
    space, features, _ = a_null_space(dead=dead)
    scene = (torch.arange(50) < 40).float()[:, None]
    x = (features + 0.1 * torch.randn(50, 8)).requires_grad_()
    centred = scene * (x - (scene * x).sum(0) / scene.sum())
    plain = ((space.project(centred) / space.scale).square().sum() / scene.sum()) / 8
    (want,) = torch.autograd.grad(plain, x)
    value, got = space.variance(centred.detach(), scene.sum())
    assert float(value) == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert float(got.abs().max()) < 1  # a dead feature is not scaled by its deviation of 0


def test_the_share_of_the_variance_in_the_null_space() -> None:
    space, features, weight = a_null_space()
    inside = space.project(features)
    assert NullSpace(weight, inside).share == pytest.approx(1, abs=1e-4)
    assert NullSpace(weight, features - inside).share == pytest.approx(0, abs=1e-4)
    centred, erased = (x - x.mean(0) for x in (features, inside))
    want = float(erased.square().sum() / centred.square().sum())
    assert space.share == pytest.approx(want, rel=1e-4)


# --- in a run ----------------------------------------------------------------------------------

NULL_SPACE = replace(FEW_ROWS, erase=10.0, null_space=8.0, components=4, rounds=2, robust=0.0)


def variance_in_null_space(result: nn.Module) -> float:
    """Of the features of noise, compared with the trained TinyNet's."""
    images, (before, after) = noise_images(SPEC, 200), (tiny(), copy.deepcopy(result))
    weight = before.fc2.weight.detach()[[c for c in range(5) if c not in FORGET]]
    with torch.no_grad():
        parts = [
            model.act(model.fc1(model.act(model.bn(model.conv(images))).flatten(1)))
            for model in (before, after)
        ]
    space = NullSpace(weight, parts[0])
    return float(space.project(parts[1]).var(0).sum() / space.project(parts[0]).var(0).sum())


def test_the_null_space_of_the_retained_classes_is_erased_in_rounds() -> None:
    plain, usual = deep_run(settings=NULL_SPACE.without_null_space())
    erased, result = deep_run(settings=NULL_SPACE)
    assert plain.record.depth["null_space"] == "free"
    assert erased.record.depth["null_space"] == "erased"
    assert (plain.record.depth["rounds"], erased.record.depth["rounds"]) == (0, 2)
    assert [v["step"] for v in erased.record.depth["history"]].count(20) == 2
    assert variance_in_null_space(result) < 0.5 * variance_in_null_space(usual)
    assert_forgets(result, FORGET)
    strict, _ = deep_run(settings=replace(NULL_SPACE, robust=1.01))
    assert strict.record.depth["rounds"] == 0


def test_the_null_space_is_kept_where_erasing_it_damages_the_features() -> None:
    run, result = deep_run(settings=replace(NULL_SPACE, erase=1e4, null_space=1e4, rounds=0))
    assert run.record.depth["level"] == "deep"
    assert run.record.depth["null_space"] == "free"
    assert_forgets(result, FORGET)


def test_a_null_space_with_little_in_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_LEAST_SHARE", 1.1)
    run, held = deep_run(settings=NULL_SPACE)
    depth = run.record.depth
    assert (depth["level"], depth["null_space"], depth["rounds"]) == ("deep", "held", 0)
    _, free = deep_run(settings=NULL_SPACE.without_null_space())
    assert variance_in_null_space(held) < variance_in_null_space(free)


def test_the_null_space_is_that_of_a_linear_last_layer_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    run, _ = deep_run(model, settings=replace(NULL_SPACE, leak=1.0, most_leak=1.0))
    assert run.record.depth["null_space"] == "free"


@pytest.mark.parametrize(("share", "attempts"), [(0.0, 2), (1.1, 2), (None, 1)])
def test_only_what_differs_is_tried_a_second_time(
    share: float | None, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the null space erased, held, and free because of the last layer."""
    monkeypatch.setattr(losses, "_LEAST_SHARE", share)
    if share is None:
        monkeypatch.setattr(deep, "_is_linear_last", lambda *_: False)
    tried: list[object] = []

    def counted(*args: Any) -> dict[str, Any]:
        tried.append(args)
        return deep.forget_deeply(*args)

    monkeypatch.setattr(fit_stage, "forget_deeply", counted)
    run, _ = deep_run(settings=replace(NULL_SPACE, rate=1e-9, rounds=0, factors=(1.0,)))
    assert run.record.depth["level"] == "output"
    assert run.record.depth["null_space"] == "free"
    assert len(tried) == attempts


def test_a_stop_ends_the_rounds() -> None:
    events: list[Event] = []

    def callback(event: Event) -> bool:
        events.extend([event] * (event.stage == "fit"))
        return len(events) == 6

    run, _ = deep_run(settings=NULL_SPACE, callback=callback)
    assert run.record.depth["rounds"] == 1

"""Deep forgetting, the default: the features lose the classes, the user loses nothing."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deep_case import CPU, TwoClassifiers, deep_split, last_layer_swapped
from support import (
    FEW_ROWS,
    FORGET,
    SPEC,
    TinyNet,
    assert_forgets,
    bits,
    changed_tensors,
    deep_run,
    same_bits,
    snapshot,
    tiny,
    tiny_data,
    train,
    untouched,
)
from torch import Tensor, nn

import zsu_fast
from zsu_fast import ClassImpressions, UnlearningWarning, ZeroShotUnlearner, synthesize
from zsu_fast.errors import ArgumentError
from zsu_fast.models import zoo
from zsu_fast.models.parameters import weights_hash
from zsu_fast.runtime.progress import Event
from zsu_fast.training.deep import deep as deep_module, settings as settings_module
from zsu_fast.training.deep.checks import LEAST_AGREEMENT
from zsu_fast.training.deep.losses import USABLE_ROOM, DeepObjective, room_above_floor
from zsu_fast.training.deep.settings import DeepSettings
from zsu_fast.training.deep.tail import FrozenClassifierTail
from zsu_fast.training.features import FeatureSet, logit_margin

OBJECTS = [3, 4, 8]
SMALL = DeepSettings(scenes=768, inverted=256, steps=80, batch=128)


# --- a trained network -----------------------------------------------------------------------


@dataclass
class Run:
    original: nn.Module
    deep: nn.Module
    output: nn.Module
    run: ZeroShotUnlearner
    fresh: ClassImpressions  # images of the original, which no run saw


@pytest.fixture(scope="module")
def karpathynet() -> Run:
    original = zoo.load("karpathynet")
    run = ZeroShotUnlearner(original, OBJECTS, progress=False)
    run.options.deep = SMALL
    with untouched(original):
        deep = run.run()
    output = zsu_fast.unlearn(original, OBJECTS, depth="output", progress=False)
    fresh = synthesize(original, per_class=16, seed=99, progress=False)
    return Run(original, deep, output, run, fresh)


def unmasked_leak(model: nn.Module, case: Run) -> float:
    """Share of fresh forget impressions that the original last layer still gives away."""
    images = case.fresh.images[torch.isin(case.fresh.labels, torch.tensor(OBJECTS))]
    answers = last_layer_swapped(model, case.original, "fc1", images)
    return float(torch.isin(answers, torch.tensor(OBJECTS)).float().mean())


def test_original_last_layer_finds_no_forgotten_class(karpathynet: Run) -> None:
    assert unmasked_leak(karpathynet.output, karpathynet) > 0.9
    assert unmasked_leak(karpathynet.deep, karpathynet) < 0.05


def test_outputs_forget_and_keep_the_rest(karpathynet: Run) -> None:
    with torch.no_grad():
        answers = karpathynet.deep(karpathynet.fresh.images).argmax(1)
    forgotten = torch.isin(karpathynet.fresh.labels, torch.tensor(OBJECTS))
    assert not torch.isin(answers, torch.tensor(OBJECTS)).any()
    assert float((answers == karpathynet.fresh.labels)[~forgotten].float().mean()) > 0.9


def test_the_record_says_what_was_measured(karpathynet: Run) -> None:
    record = karpathynet.run.record.to_dict()
    recorded = record["depth"]
    assert (recorded["depth"], recorded["level"]) == ("deep", "deep")
    assert "fallback" not in recorded
    assert recorded["unmask_leak"]["before"] > 0.9
    assert recorded["unmask_leak"]["after"] <= 0.08
    assert recorded["agreement"]["before"] == 1
    assert 0.5 < recorded["agreement"]["after"] < 1
    assert recorded["evidence"]["after"] < recorded["evidence"]["before"] - 0.05
    assert recorded["layers"] == ["conv3.weight", "conv3.bias"]
    assert (recorded["inverted_at"], recorded["drawn_as"]) == ("conv1", [3, 32, 32])
    assert (recorded["rows"], recorded["held_out"]) == (448 + 192, 64 + 64)
    assert recorded["stopped"] == "all 80 steps taken"
    assert record["weights_after"] == weights_hash(karpathynet.deep)
    assert not [note for note in record["warnings"] if "level" in note]
    stages = {"deep split", "synthesise", "deepen", "fit", "total"}
    assert set(record["timings"]) == stages


def test_only_the_last_layers_are_trained(karpathynet: Run) -> None:
    changed = changed_tensors(karpathynet.original, karpathynet.deep)
    assert changed == {"conv3.weight", "conv3.bias", "fc1.weight", "fc1.bias"}
    record = karpathynet.run.record.to_dict()
    assert set(record["split"]["trained"]) == changed
    assert not record["split"]["output_level"]


def test_the_last_fit_keeps_the_margin_of_the_original(karpathynet: Run) -> None:
    """Deep forgetting leaves no logit margin: one of that would be quickly relearned."""
    margin = karpathynet.run.record.depth["margin"]
    made = karpathynet.run.impressions
    assert made is not None
    _, deep = deep_split(karpathynet.original, spec=karpathynet.original.input_spec)
    with torch.no_grad():
        margins = logit_margin(deep.flat(made.images), made.labels)
    assert margin == pytest.approx(2 * float(margins.mean()), rel=1e-4)  # all logits move
    assert margin > 1
    assert karpathynet.run.options.features.margin == margin


# --- the tiny model --------------------------------------------------------------------------


def test_the_tiny_model_forgets() -> None:
    model = tiny().train()
    with untouched(model):
        run, made = deep_run(model)
    assert run.record.depth["level"] == "deep"
    assert made.training
    assert_forgets(made, FORGET)
    assert changed_tensors(model, made) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


def test_dropout_is_off_while_layers_are_trained() -> None:
    """With it, two calls would differ, and the global generator would move."""
    models = [tiny().train(), tiny()]
    models[0].drop.p = 0.9
    before = torch.get_rng_state()
    first, second = (deep_run(model)[1] for model in models)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_bits(first, second)
    assert (first.drop.training, second.drop.training) == (True, False)


def test_same_seed_same_bits() -> None:
    runs = [deep_run(seed=seed) for seed in (0, 0, 1)]
    first, again, other = (made for _, made in runs)
    assert same_bits(first, again)
    assert not same_bits(first, other)
    assert runs[0][0].record.to_dict()["depth"] == runs[1][0].record.to_dict()["depth"]


def test_pruned_weights_stay_zero() -> None:
    pruned = tiny()
    with torch.no_grad():
        weight = pruned.fc1.weight
        weight[weight.abs() < weight.abs().median()] = 0
    zero = weight == 0
    run, made = deep_run(pruned)
    assert run.record.depth["level"] == "deep"
    after = made.fc1.weight
    assert bool((after[zero] == 0).all())
    assert bool((after[~zero] != weight[~zero]).float().mean() > 0.9)


# --- the loss --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """An objective on scenes of the tiny model, whose features have changed a little."""

    objective: Callable[..., DeepObjective]
    tail: FrozenClassifierTail
    rows: FeatureSet
    forget: Tensor


@pytest.fixture
def parts() -> Parts:
    work, deep = deep_split(tiny())
    forget = torch.zeros(5, dtype=torch.bool)
    forget[FORGET] = True
    tail = FrozenClassifierTail(work, deep)
    features = deep.image_features(tiny_data(60)[0])
    with torch.no_grad():
        teacher = tail(*features).logits
    label = teacher.argmax(1)
    scene = (torch.arange(60) < 40).float()
    rows = FeatureSet(features, teacher, label, forget[label], scene=scene)

    def objective(**weights: float) -> DeepObjective:
        settings = replace(DeepSettings(keep=0.0, constant=0.0, erase=0.0), **weights)
        return DeepObjective(tail, rows, forget, 2.0, settings)

    with torch.no_grad():
        work.module.fc1.weight.add_(0.05 * torch.randn_like(work.module.fc1.weight))
        work.module.fc2.weight.zero_()  # the loss is of the original one
    return Parts(objective, tail, rows, forget)


@torch.no_grad()
def test_the_loss_is_the_sum_that_its_docstring_states(parts: Parts) -> None:
    rows, outputs = parts.rows, parts.tail(*parts.rows.features)
    forget, old, new = parts.forget, rows.teacher, outputs.logits
    assert not torch.allclose(old, new, atol=0.1)
    assert torch.equal(new, tiny().fc2(outputs.features))

    def loss(**weights: float) -> float:
        return float(parts.objective(**weights).loss_and_gradients(outputs, rows)[0])

    masked = old.masked_fill(forget, -torch.inf).log_softmax(1)
    shifted = (new + 2.0 * forget).log_softmax(1)
    divergence = (masked.exp() * (masked - shifted))[:, ~forget].sum(1).mean()
    assert loss() == pytest.approx(float(divergence), rel=1e-4)

    z, z_new = (x[:, ~forget] - x[:, ~forget].mean(1, keepdim=True) for x in (old, new))
    weight = 1 - old.softmax(1)[:, forget].sum(1)
    kept = (weight * (z_new - z).square().mean(1)).mean() / z.square().mean()
    assert loss(keep=3.0) == pytest.approx(float(divergence + 3 * kept), rel=1e-4)
    f, f_new = (x[:, forget] - x[:, ~forget].mean(1, keepdim=True) for x in (old, new))
    scenes = rows.scene == 1
    variances = [x[scenes].var(0).sum() for x in (f, f_new)]
    varying = divergence + 3 * variances[1] / variances[0]
    assert loss(constant=3.0) == pytest.approx(float(varying), rel=1e-4)
    explained, _ = parts.objective().explained_variance(outputs.features, rows)
    assert loss(erase=3.0) == pytest.approx(float(divergence + 3 * explained), rel=1e-4)


@torch.no_grad()
def test_explained_variance_is_that_of_ridge_regression_on_the_scenes(parts: Parts) -> None:
    features = parts.tail(*parts.rows.features).features.clone()
    features[40:] = 5 * torch.rand_like(features[40:])  # of inverted rows
    scenes = parts.rows.scene == 1
    x = features[scenes] - features[scenes].mean(0)
    y = (parts.rows.teacher - parts.rows.teacher.mean(1, keepdim=True))[scenes][:, parts.forget]
    y = (y - y.mean(0)) / y.std(0, correction=0)
    ridge = 0.3 * x.square().sum() / x.shape[1]
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]), x.T @ y)
    want = float((y * (x @ weights)).sum() / y.square().sum())
    got, _ = parts.objective(ridge=0.3).explained_variance(features, parts.rows)
    assert float(got) == pytest.approx(want, rel=1e-3)
    assert 0.2 < want < 0.999


@pytest.fixture(scope="module")
def after() -> Callable[..., tuple[dict[str, float], float]]:
    """What a run with some weights of the loss measures, and how far retained logits moved."""

    def run_with(**weights: float) -> tuple[dict[str, float], float]:
        none = {"keep": 0.0, "constant": 0.0, "erase": 0.0}
        settings = replace(FEW_ROWS, factors=(1.0,), leak=1.0, **none | weights)
        run, made = deep_run(settings=settings)
        (features,) = run.rows.scenes.features
        original, retained = tiny(), [c for c in range(5) if c not in FORGET]
        with torch.no_grad():
            x = features.flatten(1)
            logits = [original.fc2(m.fc1(x).relu()) for m in (original, made)]
        old, new = (z - z[:, retained].mean(1, keepdim=True) for z in logits)
        measured = {k: v["after"] for k, v in run.record.depth.items() if isinstance(v, dict)}
        spreads = [float(z[:, FORGET].var(0).sum()) for z in (old, new)]
        measured["variation"] = spreads[1] / spreads[0]
        old, new = old[:, retained], new[:, retained]
        return measured, float((new - old).square().mean())

    return run_with


def test_each_term_does_its_part(after: Callable[..., tuple[dict[str, float], float]]) -> None:
    plain, plain_change = after()
    erased, _ = after(erase=4.0)
    constant, _ = after(constant=4.0)
    _, kept_change = after(keep=8.0)
    assert plain["unmask_leak"] < 0.2  # the divergence alone sees to that
    assert erased["evidence"] < plain["evidence"] - 0.1
    assert constant["variation"] < 0.5 * plain["variation"]
    assert kept_change < 0.5 * plain_change


@pytest.mark.parametrize("floor", [False, True])
def test_a_margin_is_no_larger_than_a_floor_of_the_logits_lets_it(floor: bool) -> None:
    torch.manual_seed(0)
    last: list[nn.Module] = [nn.Linear(16, 6), *([nn.ReLU()] if floor else [])]
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), *last).eval()
    work, deep = deep_split(model)
    images = torch.randn(100, *SPEC.shape)
    features = deep.image_features(images)
    teacher = model(images).detach()
    forget = torch.arange(6) < 2
    rows = FeatureSet(features, teacher, teacher.argmax(1), forget[teacher.argmax(1)])
    before = weights_hash(work)
    room = room_above_floor(FrozenClassifierTail(work, deep), rows, forget)
    assert weights_hash(work) == before
    run, _ = deep_run(model, [1], replace(FEW_ROWS, margin=50.0, leak=1.0), margin=30.0)
    assert run.record.depth["margin"] == 30
    asked = run.record.depth["margin_asked"]
    if not floor:
        assert room == math.inf
        assert asked == 50
        return
    assert 0 < asked < 5
    # two forgotten logits at 0: nineteen rows of twenty have so much room above them
    want = teacher[:, 2:].logsumexp(1) - math.log(2)
    assert float((want >= room - 1e-5).float().mean()) == pytest.approx(0.95, abs=0.011)
    assert USABLE_ROOM < 1


# --- how far the change is taken -------------------------------------------------------------


def test_the_change_is_multiplied_by_the_first_factor_that_leaves_no_leak() -> None:
    few = replace(FEW_ROWS, steps=12, leak=-1.0)
    factors = (0.25, 1.0, 2.0)
    run, _ = deep_run(settings=replace(few, factors=factors))
    tried = run.record.depth["factors"]
    leaks = [t["unmask_leak"] for t in tried]
    assert [t["factor"] for t in tried] == list(factors)
    assert leaks[0] > leaks[1] > leaks[2]
    assert run.record.depth["factor"] == 2.0  # all leak: the least

    second, made = deep_run(settings=replace(few, factors=factors, leak=leaks[1]))
    depth = second.record.depth
    assert depth["factor"] == 1.0
    assert depth["factors"] == tried[:2]
    assert depth["unmask_leak"]["after"] == leaks[1]
    _, double = deep_run(settings=replace(few, factors=(2.0,), leak=1.0))
    start = tiny().fc1.weight
    change, doubled = (m.fc1.weight.detach() - start.detach() for m in (made, double))
    assert torch.allclose(doubled, 2 * change, atol=1e-5)
    assert float(change.abs().max()) > 1e-3


def test_a_larger_factor_is_taken_if_the_answers_stay() -> None:
    factors = (0.25, 1.0, 60.0, 80.0)
    few = replace(FEW_ROWS, steps=12, leak=1.0, factors=factors, robust=0.0, robust_factor=80.0)
    run, _ = deep_run(settings=few)
    tried = run.record.depth["factors"]
    agreements = [t["agreement"] for t in tried]
    assert run.record.depth["factor"] == 80.0
    assert agreements[1] > max(agreements[2:])

    def chosen(**changes: Any) -> float:
        run, _ = deep_run(settings=replace(few, **changes))
        return run.record.depth["factor"]

    assert chosen(robust=agreements[1]) == 1.0
    assert chosen(robust_factor=1.0) == 1.0
    assert chosen(robust_factor=0.0) == 0.25
    leaks = [t["unmask_leak"] for t in tried]
    assert leaks[0] > leaks[1]
    backwards = {"factors": (1.0, 0.25), "leak": leaks[1]}
    assert chosen(**backwards) == 1.0  # the other one leaks


def test_extrapolation_ends_before_too_few_answers_stay() -> None:
    """Steps as long as these damage the model: the first factor is the only one that is kept."""
    settings = replace(FEW_ROWS, steps=12, leak=-1.0, factors=(1.0, 60.0, 80.0))
    run, _ = deep_run(settings=settings)
    depth = run.record.depth
    assert [t["factor"] for t in depth["factors"]] == [1.0, 60.0]
    least = LEAST_AGREEMENT
    assert depth["factors"][1]["agreement"] < least <= depth["factors"][0]["agreement"]
    assert (depth["factor"], depth["level"]) == (1.0, "deep")


def test_many_classes_have_settings_of_their_own() -> None:
    settings = DeepSettings(batch=100)
    assert settings.for_classes(100) is settings
    many = settings.for_classes(101)
    assert (many.inverted_share, many.steps) == (0.65, 2 * settings.steps)
    assert many.most_leak < settings.most_leak
    assert many.leak < settings.leak
    assert set(settings.factors) < set(many.factors)
    assert list(many.factors) == sorted(many.factors)
    assert (many.constant, many.erase, many.robust_factor) == (0.0, 0.0, 0.0)
    run = ZeroShotUnlearner(tiny(), FORGET, progress=False)
    run.options.deep = replace(FEW_ROWS, batch=4)  # fewer rows than the five classes
    assert run.options.deep_settings(run.work, 5, 5, 2).inverted_share == 0.65


def test_many_strangers_have_settings_of_their_own() -> None:
    settings = DeepSettings(batch=100)
    few, many = (settings.for_classes(c).for_strangers(c) for c in (100, 101))
    assert few.stranger
    assert few.keep == settings.keep > many.keep
    assert few.inverted_share < many.inverted_share
    for strangers in (few, many):
        assert strangers.leak < settings.leak
        assert max(strangers.factors) > max(settings.factors)


def test_a_single_class_has_settings_of_its_own() -> None:
    run = ZeroShotUnlearner(tiny(), FORGET, progress=False)
    usual = run.options.deep_settings(run.work, 5, 5, 2)
    assert run.options.deep_settings(run.work, 5, 5, 1) == usual.for_single_class() != usual
    run.options.forgotten_as = "stranger"
    strangers = run.options.deep_settings(run.work, 5, 5, 1)
    assert strangers == DeepSettings().for_strangers(5)


def test_models_with_layer_norms_alone_or_batch_norms_have_settings_of_their_own() -> None:
    run = ZeroShotUnlearner(tiny(), FORGET, progress=False)
    usual = DeepSettings()
    assert usual.constant > 0
    normed = nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 5))
    assert run.options.deep_settings(normed, 5, 5, 2) == usual.for_layer_norm()
    both = nn.Sequential(normed, nn.BatchNorm1d(5))
    assert run.options.deep_settings(both, 5, 5, 2) == usual.for_batch_norm()
    assert run.options.deep_settings(nn.Linear(192, 5), 5, 5, 2) == usual
    many = usual.batch + 1
    assert run.options.deep_settings(both, many, many, 2) == usual.for_classes(many)
    run.options.set_multi_label(True)
    assert run.options.deep_settings(normed, 5, 5, 2).constant > 0
    assert run.options.deep_settings(both, 5, 5, 2).null_space == 0


def test_features_that_still_leak_are_given_up() -> None:
    weak = replace(FEW_ROWS, steps=3, rate=0.004, factors=(1.0,))
    run, result = deep_run(settings=weak)
    depth = run.record.depth
    assert depth["unmask_leak"]["after"] > 0.4
    assert depth["level"] == "output"
    assert "still assigns" in depth["fallback"]
    assert changed_tensors(tiny(), result) == {"fc2.weight", "fc2.bias"}


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ({"rate": 1e-6, "leak": -1.0, "factors": (1.0, 1e8)}, "still assigns 100%"),
        ({"rate": 2.0, "slack": 0.0}, "answers stayed"),
    ],
    ids=["leaks", "damaged"],
)
def test_hopeless_training_ends_after_a_quarter_of_the_steps(
    harm: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep_module, "_FEWEST_CHECKED", 1)
    monkeypatch.setattr(deep_module, "_SLACK", harm.pop("slack", deep_module._SLACK))
    stages: list[tuple[str, int]] = []
    run, result = deep_run(
        settings=replace(FEW_ROWS, steps=8, **harm),
        callback=lambda e: stages.append((e.stage, e.done)),
    )
    depth = run.record.depth
    assert depth["level"] == "output"
    assert depth["fallback"].startswith("after 2 of 8 steps, ")
    assert reason in depth["fallback"]
    assert next(done for stage, done in stages if stage == "fit") == 2
    assert changed_tensors(tiny(), result) == {"fc2.weight", "fc2.bias"}


def without_norms() -> nn.Module:
    return train(
        nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 32), nn.ReLU(),
                      nn.Linear(32, 5))
    )  # fmt: skip


# more classes than rows in a batch; 256 inverted rows, in two chunks
MANY = replace(FEW_ROWS, batch=4, steps=16, inverted=64, inverted_per_class=256 / 5)


def test_an_early_check_ends_the_synthesis_if_training_is_hopeless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deep_module, "_FEWEST_CHECKED", 1)
    torch.manual_seed(0)
    original, events = without_norms(), []
    hopeless = replace(MANY, rate=1e-6, leak=-1.0, factors=(1.0, 1e8))
    with untouched(original):
        run, result = deep_run(original, settings=hopeless, callback=events.append)
    depth = run.record.depth
    assert depth["level"] == "output"
    assert depth["fallback"].startswith("after 8 of 32 steps, the original last layer still")
    rows = [e.done for e in events if e.stage == "synthesise" and e.total == 256]
    assert rows == [128]
    assert changed_tensors(original, result) <= {"5.weight", "5.bias"}


def test_an_early_check_that_passes_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_module, "_FEWEST_CHECKED", 1)
    torch.manual_seed(0)
    original = without_norms()
    checked, result = deep_run(original, settings=MANY)
    monkeypatch.setattr(settings_module, "has_norm", lambda _: True)
    unchecked, expected = deep_run(original, settings=MANY)
    assert checked.rows is not None
    assert unchecked.rows is not None
    assert checked.rows.settings.early_check
    assert not unchecked.rows.settings.early_check
    assert checked.record.depth == unchecked.record.depth
    assert checked.record.depth["level"] == "deep"
    assert not changed_tensors(result, expected)


def test_only_models_of_many_classes_without_norms_are_checked_early() -> None:
    settings, plain = DeepSettings(batch=4), without_norms()
    assert settings.for_model(plain, 5, 1, False, False).early_check
    assert not settings.for_model(plain, 4, 1, False, False).early_check
    assert not settings.for_model(plain, 5, 1, False, True).early_check
    for norm in (nn.BatchNorm2d(8), nn.InstanceNorm2d(8), nn.LayerNorm(8), nn.GroupNorm(2, 8)):
        normed = nn.Sequential(norm, plain)
        assert not settings.for_model(normed, 5, 1, False, False).early_check


def test_training_goes_on_while_a_larger_factor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows may leak after a quarter of the steps, and none at the end (a random ViT-B/16)."""
    monkeypatch.setattr(deep_module, "_FEWEST_CHECKED", 1)
    run, _ = deep_run(settings=replace(FEW_ROWS, steps=8, rate=1e-9))
    assert run.record.depth["fallback"].startswith("the original last layer still assigns 100%")


def test_options_without_effect_are_named() -> None:
    run = ZeroShotUnlearner(tiny(), FORGET, max_steps=7, batch_norm=0.1, progress=False)
    (said,) = run.record.depth["unused"]
    assert said.startswith("max_steps, batch_norm had no effect")
    for options in ({"space": "input"}, {"depth": "output"}, {"tail": "last"}):
        other = ZeroShotUnlearner(tiny(), FORGET, max_steps=7, progress=False, **options)
        assert other.record.depth["unused"] == []
    quick, _ = deep_run(max_steps=7)
    assert any("max_steps had no effect" in note for note in quick.record.warnings)


def test_more_steps_than_deep_training_takes_are_said() -> None:
    run, _ = deep_run(steps=1100)
    assert any(
        note.startswith("steps=1100 only holds for the last") for note in run.record.warnings
    )
    assert not any("steps=" in note for note in deep_run(steps=FEW_ROWS.steps)[0].record.warnings)
    run.options.deep = replace(FEW_ROWS, steps=550)
    many = run.options.deep.batch + 1
    assert any(
        "at most 550 steps" in text for text in run.options.without_effect(False, run.work, 5, 2)
    )
    unused = run.options.without_effect(False, run.work, many, 2)
    assert not any("steps=" in text for text in unused)
    run.options.deep = DeepSettings()  # with rounds, where several classes are forgotten
    for forget, most in ((1, 600), (2, 1000)):
        unused = run.options.without_effect(False, run.work, 5, forget)
        assert any(f"at most {most} steps" in text for text in unused)


def test_scenes_of_forgotten_classes_alone_are_no_failure() -> None:
    """No scene says then whether the answers of retained classes stay."""
    model = tiny()
    with torch.no_grad():
        model.fc2.bias[FORGET[0]] += 100
    run, _ = deep_run(model, settings=replace(FEW_ROWS, leak=1.0))
    assert "fallback" not in run.record.depth
    assert run.record.depth["agreement"] == {"before": 1.0, "after": 1.0}


# --- fallbacks -------------------------------------------------------------------------------


def test_rows_that_no_image_has_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_module, "_MOST_MARGIN", 0.1)
    with pytest.warns(UnlearningWarning, match="level: output. .*no image has such features"):
        run, made = deep_run()
    assert changed_tensors(tiny(), made) == set(run.record.split["trained"])


class Vanishing(nn.Module):
    """Features of 1e-32, whose squares are 0, and weights that make up for it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = TinyNet(classes=24), nn.Linear(24, 5)
        with torch.no_grad():
            self.fc.weight *= 1e32
            for name, parameter in self.body.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x * 1e-32))


def test_rows_that_are_not_finite_are_not_trained_on() -> None:
    torch.manual_seed(0)
    original = Vanishing()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnlearningWarning)
        run, made = deep_run(original)
    assert any("level: output" in str(w.message) for w in caught)
    assert "not finite" in run.record.depth["fallback"]
    assert all(bool(p.isfinite().all()) for p in made.parameters())


def test_many_changed_answers_are_warned_of() -> None:
    settings = replace(FEW_ROWS, factors=(2.8,))
    with pytest.warns(UnlearningWarning, match="changed .*% of the retained answers on held-out"):
        run, _ = deep_run(settings=settings)
    assert 0.8 <= run.record.depth["agreement"]["after"] < 0.85


def single_layer() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))


class Untraceable(TinyNet):
    """torch.fx can't trace len(x), and no module returns what the last layer takes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return self.fc2(self.act(self.fc1(x.view(len(x), -1))) + 1)


STILL = replace(FEW_ROWS, rate=1e-9)
HARMFUL = replace(FEW_ROWS, factors=(40.0,))


@pytest.mark.parametrize(
    ("model", "settings", "options", "reason"),
    [
        (single_layer, FEW_ROWS, {}, "single layer with weights: no features"),
        (TwoClassifiers, FEW_ROWS, {}, "not the only way from the features to the logits"),
        (Untraceable, FEW_ROWS, {}, "'fc2' takes is no module's output"),
        (TinyNet, STILL, {}, "still assigns 100% of the held-out rows of forgotten classes to one"),
        (TinyNet, HARMFUL, {}, "on held-out scenes, only .*% of the answers stayed"),
        (TinyNet, FEW_ROWS, {"learning_rate": 1e30}, "non-finite values .*given up"),
    ],
    ids=["single layer", "two classifiers", "untraceable", "still leaks", "damaged", "diverged"],
)
def test_where_it_is_not_possible_only_the_outputs_forget(
    model: Callable[[], nn.Module], settings: DeepSettings, options: dict[str, Any], reason: str
) -> None:
    torch.manual_seed(0)
    original = train(model())
    data, wrong = tiny_data(), options.get("learning_rate")
    with pytest.warns(UnlearningWarning, match=f"level: output. .*{reason}"), untouched(original):
        run, made = deep_run(original, settings=settings, **options)
    depth = run.record.depth
    assert (depth["depth"], depth["level"]) == ("deep", "output")
    assert [n for n in run.record.warnings if n.startswith("level: ") and depth["fallback"] in n]
    last = set(run.record.split["trained"])
    assert run.record.split["output_level"]  # of two classifiers, the rows of both are trained
    assert changed_tensors(original, made) <= last
    assert changed_tensors(original, run.work.module) <= last  # what was tried is undone
    assert all(bool(p.isfinite().all()) for p in made.parameters())
    if wrong is None:  # no learning rate is of use for the last layer then
        with torch.no_grad():
            masked = zsu_fast.mask(original, FORGET)(data[0]).argmax(1)
            same = float((made(data[0]).argmax(1) == masked).float().mean())
        assert same > 0.99


def test_an_error_or_ctrl_c_leaves_the_working_copy_as_it_was() -> None:
    for at in (1, 3):
        events: list[Event] = []

        def interrupt(event: Event, at: int = at, events: list[Event] = events) -> None:
            events += [event] * (event.stage == "fit")
            if len(events) == at:
                raise KeyboardInterrupt

        model = tiny()
        run = ZeroShotUnlearner(model, FORGET, callback=interrupt, inplace=True, progress=False)
        run.options.deep = FEW_ROWS
        run.synthesise()
        before = snapshot(run.work)
        with untouched(model), pytest.raises(KeyboardInterrupt):
            run.fit()
        assert snapshot(run.work) == before


# --- stops -----------------------------------------------------------------------------------


def test_a_callback_stops_the_inversion() -> None:
    run, made = deep_run(callback=lambda event: event.stage == "synthesise")
    assert len(run.impressions) == 128
    assert run.record.depth["level"] == "deep"
    assert_forgets(made, FORGET)


def test_a_callback_stops_the_training_of_the_layers_and_the_fit_goes_on() -> None:
    events: list[Event] = []

    def callback(event: Event) -> bool:
        events.extend([event] * (event.stage == "fit"))
        return len(events) == 3

    run, made = deep_run(callback=callback)
    assert "callback asked to stop" in run.record.depth["stopped"]
    assert run.record.depth["history"][-1]["step"] == 45
    assert run.record.depth["level"] == "deep"
    assert "callback" not in run.stopped
    assert len(events) > 10
    assert_forgets(made, FORGET)


def test_a_callback_stops_the_fit_of_the_last_layer() -> None:
    events: list[Event] = []

    def callback(event: Event) -> bool:
        events.extend([event] * (event.stage == "fit"))
        return len(events) == 6  # four validations of the layers, two of the last one

    run, made = deep_run(callback=callback)
    assert run.record.depth["stopped"] == "all 60 steps taken"
    assert "callback asked to stop in fit" in run.stopped
    assert len(events) == 6
    assert "fc1.weight" in changed_tensors(tiny(), made)


# --- given impressions -----------------------------------------------------------------------


def test_images_serve_in_place_of_inverted_rows() -> None:
    images = synthesize(tiny(), per_class=16, input_shape=(3, 8, 8), progress=False)
    run, made = deep_run(impressions=images)
    assert run.options.space == "input"
    assert run.impressions is images
    depth = run.record.depth
    assert depth["level"] == "deep"
    assert depth["unmask_leak"]["after"] <= 0.1 < 0.9 < depth["unmask_leak"]["before"]
    assert depth["rows"] + depth["held_out"] == 512 + 80
    assert "synthesise" not in run.record.timings
    assert_forgets(made, FORGET)


def test_images_are_synthesised_if_they_are_asked_for() -> None:
    run, made = deep_run(space="input")
    assert run.impressions.space == "input"
    assert len(run.impressions) == 40
    assert run.record.depth["level"] == "deep"
    assert_forgets(made, FORGET)


def test_vectors_can_be_given_where_rows_are_inverted_later() -> None:
    """They have two dimensions, as the rows of an early split have."""
    torch.manual_seed(0)
    narrow = [nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16)]
    model = nn.Sequential(*narrow, nn.ReLU(), nn.Linear(16, 4)).eval()
    vectors = {"input_shape": (12,), "mean": 0.5, "std": 0.25}
    made = synthesize(model, per_class=16, progress=False, **vectors)
    run, _ = deep_run(model, [2], replace(FEW_ROWS, leak=1.0), impressions=made, **vectors)
    assert run.rows.deep.flat.shapes == [(8,)]
    assert run.impressions.images.shape == (64, 12)
    assert run.record.fit["best"]["leak"] < 0.05


def test_inverted_rows_can_be_saved_and_passed_back(tmp_path: Path) -> None:
    first, made = deep_run()
    first.impressions.save(tmp_path / "rows.safetensors")
    loaded = ClassImpressions.load(tmp_path / "rows.safetensors")
    again, same = deep_run(impressions=loaded)
    assert again.options.space == "tail-input"
    assert again.impressions is loaded
    assert bits(loaded.images) == bits(first.impressions.images)
    assert same_bits(made, same)


def test_rows_of_a_part_of_many_classes_can_be_passed_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where rows are dear, some retained class has none."""
    monkeypatch.setattr(settings_module, "_ASCENT_WORK", 1.0)
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()
    model = nn.Sequential(*layers, nn.Linear(16, 400)).eval()
    few = replace(FEW_ROWS, leak=8.0)
    first, made = deep_run(model, range(200), few)
    assert first.record.depth["level"] == "deep"
    labels = first.impressions.labels.unique().tolist()
    assert set(range(200)) < set(labels) < set(range(400))
    again, same = deep_run(model, range(200), few, impressions=first.impressions)
    assert again.impressions is first.impressions
    assert same_bits(made, same)


def test_rows_of_another_split_are_refused() -> None:
    first, _ = deep_run(tail="conv")
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
                          nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5)).eval()  # fmt: skip
    with untouched(model), pytest.raises(ArgumentError, match="impressions: got points of 192"):
        deep_run(model, impressions=first.impressions)


# --- refusals and large images ---------------------------------------------------------------


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ArgumentError, match="depth") as caught:
        deep_run(depth="abyss")
    assert "output, deep" in str(caught.value)
    with pytest.raises(ArgumentError, match="objective of its own"):
        deep_run(depth="deep", objective="differential")
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError, match="only the last layer follows"):
        deep_run(model, depth="deep", tail="fc2", inplace=True)


@pytest.mark.parametrize(
    ("options", "depth"),
    [
        ({}, "deep"), ({"tail": "auto"}, "deep"), ({"tail": 2}, "deep"), ({"tail": "fc1"}, "deep"),
        ({"tail": "last"}, "output"), ({"tail": 1}, "output"),
        ({"objective": "differential"}, "output"), ({"depth": "output"}, "output"),
        ({"depth": "deep"}, "deep"),
    ],
    ids=str,
)  # fmt: skip
def test_the_default_depth(options: dict[str, Any], depth: str) -> None:
    run = ZeroShotUnlearner(tiny(), FORGET, **options)
    assert run.options.depth == run.record.depth["depth"] == depth
    assert run.options.space == "tail-input"


@pytest.mark.usefixtures("hardly_any_rows")
def test_a_model_of_large_images_trains_on_reduced_ones() -> None:
    torch.manual_seed(0)
    halving = [nn.Sequential(nn.Conv2d(n, 6, 3, 2, 1), nn.ReLU()) for n in (3, 6, 6, 6)]
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*halving, *pool, nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    run, made = deep_run(model, [1], input_shape=(3, 192, 192))
    assert run.record.depth["level"] == "deep"
    assert run.record.depth["drawn_as"] == [3, 128, 128]
    assert copy.deepcopy(made)(torch.rand(1, 3, 192, 192)).shape == (1, 5)
    assert run.device == CPU

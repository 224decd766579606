"""Deep forgetting: the features lose the classes, the user loses nothing."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from support import QUICK, TinyNet, tiny_data, train
from torch import Tensor, nn

import zsu_fast
from zsu_fast.errors import ArgumentError
from zsu_fast.models import zoo
from zsu_fast.models.parameters import weights_hash
from zsu_fast.models.wrapper import working_copy
from zsu_fast.synthesis import dead_leaves as drawing
from zsu_fast.synthesis.dead_leaves import sample_dead_leaves
from zsu_fast.synthesis.impressions import ClassImpressions
from zsu_fast.synthesis.synthesize import synthesize
from zsu_fast.training.deep.deep import find_deep_split
from zsu_fast.training.deep.losses import DeepObjective, room_above_floor
from zsu_fast.training.deep.settings import DeepSettings
from zsu_fast.training.deep.tail import DualClassifierTail
from zsu_fast.training.features import FeatureSet, held_out, logit_margin
from zsu_fast.unlearner import ZeroShotUnlearner

FORGET = [3, 4, 8]
SMALL = DeepSettings(scenes=768, pushed=200, steps=120, batch=128)


@dataclass
class Run:
    original: zoo.KarpathyNet
    deep: zoo.KarpathyNet
    output: nn.Module
    run: ZeroShotUnlearner
    fresh: ClassImpressions  # of the original, from another seed


@pytest.fixture(scope="module")
def karpathynet() -> Run:
    original = zoo.load("karpathynet")
    made = synthesize(original, per_class=8, progress=False)
    run = ZeroShotUnlearner(original, FORGET, depth="deep", impressions=made, progress=False)
    run.options.deep = SMALL
    deep = run.run()
    output = zsu_fast.unlearn(original, FORGET, impressions=made, progress=False)
    fresh = synthesize(original, per_class=16, seed=99, progress=False)
    return Run(original, deep, output, run, fresh)


def unmasked_leak(model: nn.Module, case: Run) -> float:
    """Share of fresh forget impressions that the original last layer still gives away."""
    images = case.fresh.images[torch.isin(case.fresh.labels, torch.tensor(FORGET))]
    trained, model.fc1 = model.fc1, case.original.fc1
    try:
        answers = model(images).argmax(1)
    finally:
        model.fc1 = trained
    return float(torch.isin(answers, torch.tensor(FORGET)).float().mean())


def test_original_last_layer_finds_no_forgotten_class(karpathynet: Run) -> None:
    assert unmasked_leak(karpathynet.output, karpathynet) > 0.9
    assert unmasked_leak(karpathynet.deep, karpathynet) < 0.02


def test_outputs_forget_and_keep_the_rest(karpathynet: Run) -> None:
    answers = karpathynet.deep(karpathynet.fresh.images).argmax(1)
    forgotten = torch.isin(karpathynet.fresh.labels, torch.tensor(FORGET))
    assert not torch.isin(answers, torch.tensor(FORGET)).any()
    assert float((answers == karpathynet.fresh.labels)[~forgotten].float().mean()) > 0.9


def test_the_record_says_what_was_measured(karpathynet: Run) -> None:
    recorded = karpathynet.run.record.to_dict()["depth"]
    assert recorded["depth"] == "deep"
    assert recorded["unmask_leak"]["before"] > 0.1
    assert recorded["unmask_leak"]["after"] < 0.02
    assert recorded["evidence"]["after"] < recorded["evidence"]["before"] - 0.05


def test_the_last_fit_keeps_the_margin_of_the_original(karpathynet: Run) -> None:
    """Deep forgetting leaves no logit margin: one of that would be quickly relearned."""
    margin = karpathynet.run.record.depth["margin"]
    impressions = karpathynet.run.impressions
    assert impressions is not None
    train = ~held_out(impressions.labels)
    with torch.no_grad():
        logits = karpathynet.original(impressions.images[train])
    margins = logit_margin(logits, impressions.labels[train])
    assert margin == pytest.approx(2 * float(margins.mean()), rel=1e-4)  # all logits move
    assert margin > 1
    assert karpathynet.run.options.features.margin == margin


def test_only_the_last_layers_are_trained(karpathynet: Run) -> None:
    before, after = karpathynet.original.state_dict(), karpathynet.deep.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"conv3.weight", "conv3.bias", "fc1.weight", "fc1.bias"}
    record = karpathynet.run.record.to_dict()
    assert set(record["split"]["trained"]) == changed
    assert not record["split"]["output_level"]


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    return train(TinyNet())


def test_batchnorm_statistics_stay_and_seeds_decide(tiny: nn.Module) -> None:
    before = weights_hash(tiny)
    quick = QUICK | {"steps": 30}
    first, again, other = (
        zsu_fast.unlearn(tiny, [1], depth="deep", seed=seed, **quick) for seed in (0, 0, 1)
    )
    assert weights_hash(tiny) == before
    assert weights_hash(first) == weights_hash(again) != weights_hash(other)
    for name, buffer in tiny.named_buffers():
        assert torch.equal(buffer, dict(first.named_buffers())[name])


def test_tiny_model_forgets(tiny: nn.Module) -> None:
    data = tiny_data()
    made = zsu_fast.unlearn(tiny, [1], depth="deep", **QUICK)
    result = zsu_fast.evaluate(made, data, [1])
    mask = zsu_fast.evaluate(zsu_fast.mask(tiny, [1]), data, [1])
    assert result.forget_accuracy is not None
    assert result.retain_accuracy is not None
    assert mask.retain_accuracy is not None
    assert result.forget_accuracy < 1
    assert result.retain_accuracy > mask.retain_accuracy - 5


def test_each_term_does_its_part(tiny: nn.Module) -> None:
    def facts(**weights: float) -> tuple[dict[str, float], float]:
        run = ZeroShotUnlearner(tiny, [1], depth="deep", **QUICK)
        run.options.deep = DeepSettings(scenes=512, pushed=256, **weights)
        made = run.run()
        size = made.fc1(tiny_features(made)).relu().square().mean().detach()
        return {k: v["after"] for k, v in run.record.depth.items() if isinstance(v, dict)}, float(
            size
        )

    plain, plain_size = facts(unmask=0, shrink=0, erase=0)
    erased, _ = facts(unmask=0, shrink=0, erase=3)
    _, small_size = facts(unmask=0, shrink=1, erase=0)
    assert erased["evidence"] < plain["evidence"] - 0.1
    assert small_size < 0.7 * plain_size


def tiny_features(model: nn.Module) -> Tensor:
    """What fc1 takes."""
    images, _ = tiny_data(100)
    return model.act(model.bn(model.conv(images))).flatten(1)


class Residual(nn.Module):
    """Two blocks, the second of which the tail is to start at."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.one(self.stem(x).relu().mean((2, 3))).relu()
        return self.last((stream + self.three(self.two(stream).relu())).relu())


def test_inner_layers_are_those_whose_input_nothing_else_reads() -> None:
    model = working_copy(Residual(), torch.device("cpu"))
    cut = find_deep_split(model, "one", images := torch.randn(4, 3, 8, 8))
    tail = DualClassifierTail(model, cut, images)
    # the input of `two` is the residual stream, which others read too; that of `one` is the split
    assert tail.inner == [model.module.get_submodule("three")]
    (inside,) = tail(*cut.backbone(images)).inside
    assert inside.shape == (4, 16)


def test_what_inner_layers_take_is_erased_too() -> None:
    model = train(Residual())

    def evidence(weight: float) -> dict[str, float]:
        run = ZeroShotUnlearner(model, [1], depth="deep", tail="one", **QUICK | {"steps": 200})
        run.options.deep = DeepSettings(scenes=512, pushed=256, inside=weight, steps=200)
        run.run()
        recorded: dict[str, float] = run.record.depth["evidence_inside"]
        return recorded

    left, erased = evidence(0), evidence(3)
    assert erased["before"] == left["before"] > 0.3
    assert erased["after"] < 0.7 * left["after"]


def test_features_shrink_less_where_inner_layers_are_erased_too() -> None:
    model = working_copy(Residual(), torch.device("cpu"))
    images, forget = torch.randn(32, 3, 8, 8), torch.arange(5) == 1

    def shrunk(at: str) -> float:
        cut = find_deep_split(model, at, images)
        teacher = model(images).detach()
        top = teacher.argmax(1)
        rows = FeatureSet(
            tuple(f.detach() for f in cut.backbone(images)), teacher, top, forget[top]
        )
        losses = []
        for both in (0.0, 1.0):
            weights = {"unmask": 0, "erase": 0, "inside": 0, "shrink_inside": both}
            settings = DeepSettings(**weights, shrink=4 * both)
            tail = DualClassifierTail(model, cut, images)
            objective = DeepObjective(tail, rows, forget, 1.0, settings)
            losses.append(float(objective.loss(tail(*rows.features), rows).detach()))
        return losses[1] - losses[0]

    assert shrunk("one") == pytest.approx(1, abs=1e-3)  # `three` is an inner layer
    assert shrunk("three") == pytest.approx(4, abs=1e-3)  # none


def test_large_images_have_a_shallower_tail() -> None:
    layers = [nn.Conv2d(3 if n == 0 else 4, 4, 3, padding=1) for n in range(19)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    work = working_copy(model, torch.device("cpu"))
    small, large = (find_deep_split(work, "auto", torch.randn(4, 3, n, n)) for n in (64, 65))
    assert (small.name, large.name) == ("13", "17")  # six and two of twenty, and the last one


def test_scenes_that_cost_much_are_fewer() -> None:
    cpu, settings = torch.device("cpu"), DeepSettings()
    seven = settings.fit_to(7)
    assert seven.scenes_for(8192, 10, 41_000_000, cpu) == (12_000, 3_000)  # ResNet-20
    two = settings.fit_to(2)
    assert two.scenes_for(4096, 10, 4_000_000, cpu) == (4_000, 1_000)  # KarpathyNet
    four = settings.fit_to(4)
    scenes, pushed = four.scenes_for(86_528, 1000, 820_000_000, cpu)  # SqueezeNet
    assert 1_000 < scenes < 1_500
    assert pushed == scenes // 4
    assert four.scenes_for(86_528, 1000, 820_000_000, torch.device("cuda"))[0] > 3_000
    assert settings.scenes_for(1, 100_000, 1, cpu)[0] < 2_000
    assert settings.scenes_for(10**7, 10, 10**12, cpu) == (256, 256)


@pytest.mark.parametrize("floor", [False, True])
def test_a_margin_is_no_larger_than_a_floor_of_the_logits_lets_it(floor: bool) -> None:
    torch.manual_seed(0)
    last: list[nn.Module] = [nn.Linear(16, 6), *([nn.ReLU()] if floor else [])]
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), *last)
    work, images = working_copy(model, torch.device("cpu")), torch.randn(100, 3, 4, 4)
    cut = find_deep_split(work, "1", images)
    features = cut.features(images)
    teacher = model(images).detach()
    forget = torch.arange(6) < 2
    rows = FeatureSet(features, teacher, teacher.argmax(1), forget[teacher.argmax(1)])
    before = weights_hash(work)
    room = room_above_floor(DualClassifierTail(work, cut, images), rows, forget)
    assert weights_hash(work) == before
    run = ZeroShotUnlearner(
        model, [1], depth="deep", input_shape=(3, 4, 4), mean=0.5, std=0.25, margin=50.0, **QUICK
    )
    run.run()
    assert (run.record.depth["margin_asked"] < run.record.depth["margin"] == 50) is floor
    if not floor:
        assert room == math.inf
        return
    # two forgotten logits at 0: nineteen rows of twenty have so much room above them
    want = teacher[:, 2:].logsumexp(1) - math.log(2)
    assert float((want >= room - 1e-5).float().mean()) == pytest.approx(0.95, abs=0.011)


def test_pruned_weights_stay_zero(tiny: nn.Module) -> None:
    pruned = copy.deepcopy(tiny)
    with torch.no_grad():
        weight = pruned.fc1.weight  # type: ignore[union-attr]
        weight[weight.abs() < weight.abs().median()] = 0
    zero = weight == 0
    made = zsu_fast.unlearn(pruned, [1], depth="deep", **QUICK)
    after = made.fc1.weight
    assert bool((after[zero] == 0).all())
    assert bool((after[~zero] != weight[~zero]).float().mean() > 0.9)


def test_a_cpu_takes_fewer_steps_of_a_heavy_tail() -> None:
    light, heavy, cpu = 1_000_000, 60_000_000, torch.device("cpu")  # KarpathyNet's, lite0's tail
    settings = DeepSettings()
    assert settings.fit_to(2).steps_for(light, cpu) == 600
    assert settings.fit_to(20).steps_for(light, cpu) == settings.steps
    assert 100 < settings.fit_to(6).steps_for(heavy, cpu) < 400
    assert settings.fit_to(6).steps_for(100 * heavy, cpu) == 100
    assert settings.fit_to(20).steps_for(heavy, torch.device("cuda")) == settings.steps


def test_vectors_have_no_scenes_but_can_be_forgotten() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    run = ZeroShotUnlearner(model, 2, depth="deep", input_shape=(12,), mean=0.5, std=0.25, **QUICK)
    run.run()
    assert set(run.record.split["trained"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert run.record.depth["unmask_leak"]["after"] < run.record.depth["unmask_leak"]["before"]


def test_few_impressions_a_class_are_warned_of(tiny: nn.Module) -> None:
    text = "impressions per class: RA may fall"
    with pytest.warns(UserWarning, match=text):
        zsu_fast.unlearn(tiny, [1], depth="deep", **QUICK | {"impressions_per_class": 2})
    run = ZeroShotUnlearner(tiny, [1], depth="deep", **QUICK | {"impressions_per_class": 4})
    run.run()
    assert not any(text in note for note in run.record.warnings)


def test_values_that_blow_up_leave_the_features(tiny: nn.Module) -> None:
    run = ZeroShotUnlearner(tiny, [1], depth="deep", learning_rate=1e30, **QUICK)
    with pytest.warns(UserWarning, match="features are unchanged"):
        made = run.run()
    assert "given up" in run.record.depth["stopped"]
    before, after = tiny.state_dict(), made.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if not n.startswith("fc2"))
    assert all(bool(t.isfinite().all()) for t in after.values())


def test_refuses_what_it_cannot_do(tiny: nn.Module) -> None:
    with pytest.raises(ArgumentError, match="depth") as caught:
        zsu_fast.unlearn(tiny, [1], depth="abyss")
    assert "output, deep" in str(caught.value)
    with pytest.raises(ArgumentError, match="objective of its own"):
        zsu_fast.unlearn(tiny, [1], depth="deep", objective="differential")
    with pytest.raises(ArgumentError, match="only the last layer follows"):
        zsu_fast.unlearn(tiny, [1], depth="deep", tail="fc2", **QUICK)
    single = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with pytest.raises(ArgumentError, match="single layer"):
        zsu_fast.unlearn(single, [1], depth="deep", input_shape=(3, 8, 8), **QUICK)


def test_scenes_are_images_of_their_seed() -> None:
    scenes = sample_dead_leaves(20, (3, 32, 32), 5)
    assert scenes.shape == (20, 3, 32, 32)
    assert 0 <= float(scenes.min()) < 0.1
    assert 0.9 < float(scenes.max()) <= 1
    assert torch.equal(scenes, sample_dead_leaves(20, (3, 32, 32), 5))
    assert not torch.equal(scenes, sample_dead_leaves(20, (3, 32, 32), 6))
    # smooth as photographs are: neighbours differ by far less than pixels at large
    step = (scenes[..., 1:] - scenes[..., :-1]).square().mean()
    assert float(step) < 0.5 * float(scenes.var())
    assert float((scenes[0] - scenes[1]).abs().mean()) > 0.05
    assert sample_dead_leaves(0, (1, 8, 8), 0).shape == (0, 1, 8, 8)


def test_leaves_lie_within_their_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    windowed = sample_dead_leaves(6, (3, 150, 230), 1)  # larger than what is drawn together
    sizes = []

    def whole(_middle: torch.Tensor, _reach: torch.Tensor, size: int) -> slice:
        sizes.append(size)
        return slice(0, size)

    monkeypatch.setattr(drawing, "_window", whole)
    assert torch.equal(sample_dead_leaves(6, (3, 150, 230), 1), windowed)
    assert sizes == 6 * 40 * [150, 230]

"""Where impressions lie: `space="tail-input"` ascends at the split and never runs the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    QUICK,
    SPEC,
    assert_forgets,
    bits,
    changed_tensors,
    same_bits,
    tiny,
    untouched,
)
from torch import Tensor, nn

from zsu_fast import (
    ArgumentError,
    ClassImpressions,
    ZeroShotUnlearner,
    evaluate,
    mask,
    split,
    synthesize,
    unlearn,
)
from zsu_fast.cli import demo
from zsu_fast.models import zoo
from zsu_fast.models.input_spec import noise_images
from zsu_fast.models.wrapper import working_copy
from zsu_fast.synthesis.space import tail_input_space

FORGET = [1, 3]
CPU = torch.device("cpu")


def run(model: nn.Module | None = None, **options: Any) -> ZeroShotUnlearner:
    """A finished run on the tiny model in the space at the split."""
    runner = ZeroShotUnlearner(
        model or tiny(), FORGET, **(QUICK | {"space": "tail-input"} | options)
    )
    runner.run()
    return runner


# --- it works --------------------------------------------------------------------------------


def test_lenet5_forgets_mnist_digits() -> None:
    model, data, forget = zoo.load("lenet5"), demo.mnist_test(), [1, 2, 3, 4]
    with untouched(model):
        result = evaluate(unlearn(model, forget, depth="output", progress=False), data, forget)
    baseline = evaluate(mask(model, forget), data, forget)
    assert result.forget_accuracy <= 0.25, str(result)  # two images of 800
    assert result.retain_accuracy >= baseline.retain_accuracy - 0.5, str(result)


@pytest.mark.shared
def test_karpathynet_forgets_cifar10_classes(cifar10: tuple[Tensor, Tensor]) -> None:
    model, forget = zoo.load("karpathynet"), [3, 4, 8]
    data = (model.input_spec.normalise(cifar10[0][:4000]), cifar10[1][:4000])
    result = evaluate(unlearn(model, forget, depth="output", progress=False), data, forget)
    baseline = evaluate(mask(model, forget), data, forget)
    assert result.forget_accuracy <= 0.5, str(result)
    assert result.retain_accuracy >= baseline.retain_accuracy - 1, str(result)


@pytest.mark.parametrize(("tail", "width"), [("fc2", 32), ("last", 32), ("fc1", 72), (2, 72)])
def test_the_tail_says_where_to_ascend(tail: str | int, width: int) -> None:
    model = tiny()
    runner = ZeroShotUnlearner(model, FORGET, tail=tail, **QUICK | {"space": "tail-input"})
    result = runner.run()
    made = runner.impressions
    assert made.images.shape == (40, width)
    assert made.space == "tail-input"
    assert made.hit.all()
    assert runner.split_point.name == ("fc2" if width == 32 else "fc1")
    assert changed_tensors(model, result) == set(runner.split_point.parameters)
    assert_forgets(result, FORGET)


def test_the_confidence_reached_is_the_tails() -> None:
    runner = run(tail="fc1")
    made = runner.impressions
    tail = split(tiny(), "fc1").tail
    with torch.no_grad():
        own = tail(made.images).softmax(1).gather(1, made.labels[:, None])[:, 0]
    assert torch.allclose(own, made.confidence, atol=1e-4)
    assert (made.confidence[made.hit] >= made.target[made.hit] - 1e-4).all()


def test_the_backbone_runs_for_a_few_noise_images_alone() -> None:
    seen = []
    for per_class in (4, 40):
        rows: list[int] = []
        runner = ZeroShotUnlearner(
            tiny(), FORGET, **(QUICK | {"space": "tail-input", "impressions_per_class": per_class})
        )
        runner.split()
        runner.work.module.conv.register_forward_hook(
            lambda _m, args, _o, rows=rows: rows.append(len(args[0]))
        )
        runner.synthesise()
        seen.append(sum(rows))
    assert seen[0] == seen[1] == 32 + 2  # two of them find the layout


# --- the space itself ------------------------------------------------------------------------


@pytest.mark.parametrize(("tail", "signed"), [("fc2", False), ("fc1", False), ("bn", True)])
def test_points_are_negative_only_where_activations_are(tail: str, signed: bool) -> None:
    made = run(tail=tail, steps=5).impressions.images
    assert bool((made < 0).any()) == signed
    if not signed:
        assert (made == 0).any()  # so that the bound is at work


@pytest.mark.parametrize("tail", ["fc1", "bn"])
def test_points_start_near_zero_and_step_at_the_activations_scale(tail: str) -> None:
    found = split(tiny(), tail)
    space = tail_input_space(found, SPEC, CPU)
    real = found.features(noise_images(SPEC, 256))[0]
    start = space.start(torch.randn(256, *space.shape))
    assert float(space.step) == pytest.approx(float(real.square().mean().sqrt()), rel=0.1)
    assert 0 < float(start.square().mean().sqrt()) < 0.2 * float(space.step)
    assert bool((start < 0).any()) == (tail == "bn")


def residual() -> nn.Module:
    """A residual network that is cheap: 3x8x8 images, the last block 64 wide on 2x2 maps."""
    model = zoo.build("resnet20_cifar")
    model.input_spec = SPEC
    return model


@pytest.mark.parametrize(("tail", "tensors"), [("layer3.2.bn2", 2), ("layer3.2", 1)])
def test_a_split_through_a_residual_block(tail: str, tensors: int) -> None:
    model = residual()
    runner = ZeroShotUnlearner(
        model, FORGET, tail=tail,
        **(QUICK | {"space": "tail-input", "impressions_per_class": 4, "steps": 5, "mixtures": 16,
                    "max_steps": 20}),
    )  # fmt: skip
    with untouched(model):
        result = runner.run()
    found, made = runner.split_point, runner.impressions
    features = found.features(noise_images(SPEC, 3))
    assert len(features) == tensors
    assert made.images.shape == (40, sum(f[0].numel() for f in features))
    assert changed_tensors(model, result) == set(found.parameters)

    space = tail_input_space(found, SPEC, CPU)
    flat = torch.cat([f.flatten(1) for f in features], 1)
    parts = space.parts(flat)
    assert all(torch.equal(p, f) for p, f in zip(parts, features, strict=True))
    with torch.no_grad():
        assert torch.allclose(space.fast_model(flat), found.tail(*features), atol=1e-5)


# --- what points depend on -------------------------------------------------------------------


def test_same_seed_same_bits() -> None:
    first, second, other = run(seed=3), run(seed=3), run(seed=4)
    for name in ("images", "labels", "confidence", "target", "steps", "hit"):
        assert bits(getattr(first.impressions, name)) == bits(getattr(second.impressions, name))
    assert not (first.impressions.images == other.impressions.images).all(1).any()
    assert same_bits(first.apply(), second.apply())
    assert not same_bits(first.apply(), other.apply())


def test_save_and_load_keep_the_space(tmp_path: Path) -> None:
    runner = run(tail="fc1")
    runner.impressions.save(tmp_path / "made.safetensors")
    loaded = ClassImpressions.load(tmp_path / "made.safetensors")
    assert loaded.space == "tail-input"
    assert bits(loaded.images) == bits(runner.impressions.images)
    again = run(tail="fc1", impressions=loaded)
    assert again.impressions is loaded
    assert same_bits(again.apply(), runner.apply())


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["input", "tail-input"])
def test_impressions_of_the_other_space_are_refused(space: str) -> None:
    model = tiny()
    made = run().impressions if space == "input" else synthesize(model, per_class=4, progress=False)
    with untouched(model), pytest.raises(ArgumentError, match=r"impressions: got .* with space="):
        unlearn(model, FORGET, impressions=made, **QUICK | {"space": space})


def test_points_of_another_split_are_refused() -> None:
    made = run(tail="fc1").impressions
    model = tiny()
    with untouched(model), pytest.raises(ArgumentError, match=r"impressions: got .*72.*32"):
        unlearn(model, FORGET, impressions=made, tail="fc2", **QUICK | {"space": "tail-input"})


def test_noise_images_are_valid_and_always_the_same() -> None:
    images = noise_images(SPEC, 5)
    torch.manual_seed(99)
    assert torch.equal(images, noise_images(SPEC, 5))
    low, high = SPEC.low.view(1, 3, 1, 1), SPEC.high.view(1, 3, 1, 1)
    assert ((images >= low) & (images <= high)).all()
    assert working_copy(tiny(), CPU)(images).isfinite().all()

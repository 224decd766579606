"""One call for any classifier: torchvision, timm and transformers, random weights, full size.

These tests cover mechanics only: random weights have nothing to forget, so accuracy is irrelevant.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from zsu_fast import ClassImpressions, InputSpec, ZeroShotUnlearner
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.models.input_spec import IMAGENET_MEAN, IMAGENET_STD
from zsu_fast.models.wrapper import pick_logits

CLASSES = 2
FORGET = [1]
# The least that exercises every stage: 8 impressions of 1 ascent step, 4 steps of the tail.
QUICK: dict[str, Any] = {
    "impressions_per_class": 4,
    "max_steps": 1,
    "restarts": 0,
    "steps": 4,
    "batch": 4,
    "mixtures": 4,
    "learning_rate": 1e-3,
    "precision": "float32",
    "depth": "output",
    "space": "input",
    "progress": False,
}


def torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    return models.get_model(name, num_classes=CLASSES)


def timm(name: str) -> nn.Module:
    module = pytest.importorskip("timm", reason="timm is not installed")
    return module.create_model(name, num_classes=CLASSES)


def transformers(name: str) -> nn.Module:
    module = pytest.importorskip("transformers", reason="transformers is not installed")
    small: dict[str, dict[str, Any]] = {
        "ViT": {
            "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
            "intermediate_size": 96,
        },
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
        "ConvNext": {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]},
        "Swin": {"embed_dim": 12, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4]},
    }  # fmt: skip
    config = getattr(module, f"{name}Config")(num_labels=CLASSES, **small[name])
    return getattr(module, f"{name}ForImageClassification")(config)


@dataclass(frozen=True)
class Case:
    """A model and where to split it.

    To save time, noise may replace the impressions, or the images may have fewer pixels than those
    inferred.
    """

    build: Callable[[str], nn.Module]
    name: str
    tail: str | int = "auto"
    noise: bool = False
    side: int | None = None

    def __str__(self) -> str:
        return f"{self.build.__name__}-{self.name}-{self.tail}"


CASES = [
    Case(torchvision, "alexnet"),
    Case(torchvision, "vgg16_bn", "last", noise=True),
    Case(torchvision, "resnet18", 4),
    Case(torchvision, "resnet50", "layer4.2", noise=True),
    Case(torchvision, "mobilenet_v3_large", "last"),
    Case(torchvision, "mobilenet_v3_small", 3),
    Case(torchvision, "efficientnet_b0", "features.8"),
    Case(torchvision, "convnext_tiny", "features.7.2", noise=True),
    Case(torchvision, "vit_b_16", "encoder.layers.encoder_layer_11", noise=True),
    Case(torchvision, "swin_t", "features.7.1", side=96),
    Case(timm, "vit_tiny_patch16_224", "blocks.11"),
    Case(timm, "regnety_002"),
    Case(timm, "tf_efficientnet_lite0", "conv_head"),
    Case(timm, "mixer_s32_224", 4),
    Case(timm, "deit_tiny_distilled_patch16_224", "last"),
    Case(transformers, "ViT", "vit.layers.2"),
    Case(transformers, "ViT"),
    Case(transformers, "ResNet", "last"),
    Case(transformers, "ConvNext", 3),
    Case(transformers, "Swin", "swin.encoder.layers.3"),
]


DEEP = [
    Case(torchvision, "squeezenet1_1"),
    Case(torchvision, "resnet18"),
    Case(timm, "vit_tiny_patch16_224"),
    Case(transformers, "ResNet"),
    Case(transformers, "Swin"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_call_unlearns(case: Case) -> None:
    model = case.build(case.name).train()  # dropout and stochastic depth must have no effect
    before = copy.deepcopy(model)
    options = QUICK | {"impressions": noise() if case.noise else None}
    shape = (3, 224, 224)
    if case.side is not None:
        assert resolve_spec(model).shape == shape
        shape = options["input_shape"] = (3, case.side, case.side)
    runner = ZeroShotUnlearner(model, FORGET, tail=case.tail, **options)
    assert runner.spec.shape == shape
    assert_unlearns(runner, model, before)


@pytest.mark.usefixtures("hardly_any_rows")
@pytest.mark.parametrize("case", DEEP, ids=str)
def test_one_call_unlearns_deeply_by_default(case: Case) -> None:
    model = case.build(case.name).train()
    before = copy.deepcopy(model)
    options = {k: v for k, v in QUICK.items() if k not in ("depth", "space", "learning_rate")}
    runner = ZeroShotUnlearner(model, FORGET, **options)
    assert_unlearns(runner, model, before)
    assert runner.record.depth["level"] == "deep", runner.record.depth["fallback"]
    assert runner.record.depth["drawn_as"] in ([3, 128, 128], [3, 224, 224])


def assert_unlearns(runner: ZeroShotUnlearner, model: nn.Module, before: nn.Module) -> None:
    """The run changes a copy of ``model``, of which ``before`` is another copy."""
    assert runner.classes == CLASSES
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = runner.run()
    messages = {str(w.message) for w in caught}
    assert set(runner.record.warnings) <= messages
    assert runner.split_point is not None
    assert (
        any("Only the last layer" in note for note in messages) == runner.split_point.output_level
    )
    if runner.record.impressions["worst_class_hit_rate"] == 0:
        assert any("no impression reached its confidence" in note for note in messages)
    if runner.record.fit["best"]["leak"] > 0.01:
        assert any("are still classified as one" in note for note in messages)

    assert differing(model, before) == set()
    changed = differing(result, before)
    assert changed <= set(runner.split_point.parameters)
    assert changed or "no state was better" in runner.stopped
    assert type(result) is type(model)
    assert all(m.training for m in (model, result))

    fresh = before
    fresh.load_state_dict(result.state_dict(), strict=True)
    images = torch.rand(1, *runner.spec.shape)
    with torch.no_grad():
        logits = pick_logits(fresh.eval()(images))
    assert logits.shape == (1, CLASSES)
    assert bool(logits.isfinite().all())
    assert differing(fresh, result) == set()


def noise() -> ClassImpressions:
    """Noise images in place of impressions: 4 per class."""
    count = 4 * CLASSES
    spec = InputSpec((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)
    return ClassImpressions(
        images=torch.rand(count, *spec.shape),
        labels=torch.arange(count) % CLASSES,
        confidence=torch.full((count,), 0.5),
        target=torch.full((count,), 0.5),
        steps=torch.ones(count, dtype=torch.int32),
        hit=torch.ones(count, dtype=torch.bool),
        spec=spec,
    )


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    """Names in the state dict whose values differ; both models must have the same names."""
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    return {name for name in a if not torch.equal(a[name], b[name])}

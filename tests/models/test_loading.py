"""Models by name: they state their images, and weights are never silently random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zsu_fast.errors import ArgumentError, CheckpointError
from zsu_fast.models import checkpoint
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.models.input_spec import processor_spec
from zsu_fast.models.loading import load_model


def test_torchvision_model_with_a_local_file(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    saved = models.squeezenet1_0(num_classes=7)
    checkpoint.save_weights(tmp_path / "w.safetensors", saved)
    for name in ("squeezenet1_0", "torchvision:squeezenet1_0"):
        model = load_model(name, str(tmp_path / "w.safetensors"), classes=7)
        assert not model.training
        assert torch.equal(model.classifier[1].weight, saved.classifier[1].weight)
        spec = resolve_spec(model)
        assert spec.shape == (3, 224, 224)
        assert spec.source == "stated by torchvision's weights"
    with pytest.raises(CheckpointError, match="classifier"):
        load_model("squeezenet1_0", str(tmp_path / "w.safetensors"), classes=8)


def test_timm_model_with_a_local_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    saved = timm.create_model("resnet10t", num_classes=4)
    checkpoint.save_weights(tmp_path / "w.pt", saved)
    for name in ("resnet10t", "timm:resnet10t"):
        model = load_model(name, str(tmp_path / "w.pt"), classes=4)
        assert torch.equal(model.fc.weight, saved.fc.weight)
        assert resolve_spec(model).source == "stated by the model's pretrained_cfg"


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "resnet18"])
def test_random_weights_are_refused(name: str) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    with pytest.raises(ArgumentError, match="weights: not given"):
        load_model(name)


def hf_folder(path: Path, processor: dict[str, Any] | None = None) -> nn.Module:
    """Saves a small ViT for 64 pixels to ``path``."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=64, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(path)
    if processor is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


PROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1], "resample": 3,
    "size": {"height": 64, "width": 64},
}  # fmt: skip


def test_transformers_folder(tmp_path: Path) -> None:
    saved = hf_folder(tmp_path, PROCESSOR)
    model = load_model(f"hf:{tmp_path}")
    assert not model.training
    assert torch.equal(model.classifier.weight, saved.classifier.weight)
    spec = resolve_spec(model)
    assert (spec.shape, spec.mean, spec.std) == ((3, 64, 64), (0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    assert (spec.resize, spec.interpolation, spec.assumed) == ((64, 64), "bicubic", False)
    assert spec.source == "stated by the model's image processor"


def test_transformers_folder_without_a_processor_states_only_the_size(tmp_path: Path) -> None:
    hf_folder(tmp_path)
    spec = resolve_spec(load_model(f"hf:{tmp_path}"))
    assert spec.shape == (3, 64, 64)
    assert spec.assumed
    assert "size stated by the model's config; ImageNet mean and std assumed" in spec.source


def test_a_processor_that_contradicts_the_model(tmp_path: Path) -> None:
    hf_folder(tmp_path, PROCESSOR | {"size": {"height": 32, "width": 32}})
    model = load_model(f"hf:{tmp_path}")
    with pytest.raises(ArgumentError, match=r"input_shape: not given.*makes images of \(32, 32\)"):
        resolve_spec(model)
    assert resolve_spec(model, (3, 64, 64), 0.5, 0.5).mean == (0.5, 0.5, 0.5)


def test_transformers_folder_without_a_trained_classifier(tmp_path: Path) -> None:
    hf_folder(tmp_path).vit.save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"weights: .*classifier.*would be random"):
        load_model(f"hf:{tmp_path}")
    with pytest.raises(ArgumentError, match=r"without config\.json"):
        load_model(f"hf:{tmp_path / 'elsewhere'}")


@pytest.mark.parametrize(
    ("processor", "shape", "resize"),
    [
        ({"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True}, 224, (256,)),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, 224, (256,)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, 384, (384, 384)),
        ({"size": 224}, 224, (224, 224)),
    ],
)
def test_image_processors(processor: dict[str, Any], shape: int, resize: tuple[int, ...]) -> None:
    spec = processor_spec({"image_mean": [0.5] * 3, "image_std": [0.5] * 3} | processor)
    assert spec.shape == (3, shape, shape)
    assert spec.resize == resize


def test_a_processor_with_another_scale() -> None:
    scaled = {"image_mean": [0.0], "image_std": [1.0], "rescale_factor": 1 / 127.5, "size": 8}
    assert processor_spec(scaled).std == pytest.approx((0.5,))
    spec = processor_spec(scaled | {"do_normalize": False, "image_std": [3.0]})
    assert (spec.mean, spec.std) == ((0.0,), pytest.approx((0.5,)))


def test_stated_by_the_weights_that_fit_the_model() -> None:
    models = pytest.importorskip("torchvision.models")
    spec = resolve_spec(models.swin_v2_t())
    assert (spec.shape, spec.resize, spec.interpolation) == ((3, 256, 256), (260,), "bicubic")
    assert not spec.assumed
    fewer = resolve_spec(models.swin_t(num_classes=5))  # no weights fit: inferred
    assert fewer.shape == (3, 224, 224)
    assert fewer.assumed


def test_stated_by_timm() -> None:
    timm = pytest.importorskip("timm")
    spec = resolve_spec(timm.create_model("tf_efficientnet_lite0", num_classes=2))
    assert (spec.shape, spec.mean) == ((3, 224, 224), (0.5,) * 3)
    assert (spec.resize, spec.interpolation) == ((256,), "bicubic")


def test_a_size_that_cannot_be_inferred() -> None:
    anywhere = nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    with pytest.raises(ArgumentError, match=r"input_shape: .*nothing tells which.*Pass input_sha"):
        resolve_spec(anywhere)
    assert resolve_spec(anywhere, (3, 32, 32)).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["torchvision:nonet", "timm:nonet", "nonet"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ArgumentError, match="nonet"):
        load_model(name, "pretrained")

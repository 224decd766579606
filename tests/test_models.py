"""Models by name: torchvision and timm state their input, and weights are never silently random."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zsu_fast import checkpoint
from zsu_fast.classifier import resolve_spec
from zsu_fast.errors import ArgumentError, CheckpointError
from zsu_fast.models import load_model


def test_torchvision_model_with_a_local_file(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    made = models.squeezenet1_0(num_classes=7)
    checkpoint.save_weights(tmp_path / "w.safetensors", made)
    for name in ("squeezenet1_0", "torchvision:squeezenet1_0"):
        model = load_model(name, str(tmp_path / "w.safetensors"), classes=7)
        assert not model.training
        assert torch.equal(model.classifier[1].weight, made.classifier[1].weight)
        spec = resolve_spec(model)
        assert spec.shape == (3, 224, 224)
        assert spec.source == "stated by torchvision's weights"
    with pytest.raises(CheckpointError, match="classifier"):
        load_model("squeezenet1_0", str(tmp_path / "w.safetensors"), classes=8)


def test_timm_model_with_a_local_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    made = timm.create_model("resnet10t", num_classes=4)
    checkpoint.save_weights(tmp_path / "w.pt", made)
    for name in ("resnet10t", "timm:resnet10t"):
        model = load_model(name, str(tmp_path / "w.pt"), classes=4)
        assert torch.equal(model.fc.weight, made.fc.weight)
        assert resolve_spec(model).source == "stated by the model's pretrained_cfg"


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18", "resnet18"])
def test_random_weights_are_refused(name: str) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    with pytest.raises(ArgumentError, match="weights: not given"):
        load_model(name)


@pytest.mark.parametrize("name", ["torchvision:nonet", "timm:nonet", "nonet"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ArgumentError, match="nonet"):
        load_model(name, "pretrained")

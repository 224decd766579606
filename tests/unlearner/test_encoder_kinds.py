"""Encoders of transformers, timm and torchvision, tiny and untrained, through the whole call."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import FEW_ROWS
from torch import nn

import zsu_fast
from zsu_fast import EmbeddingClassifier
from zsu_fast.models.embeddings import embed_images
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.models.input_spec import noise_images

_OPTIONS: dict[str, Any] = {"mean": 0.5, "std": 0.5, "progress": False}
_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
_TEXT = _TOWER | {"vocab_size": 50, "max_position_embeddings": 8}
_IMAGES = _TOWER | {"image_size": 32, "patch_size": 8}


def _clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=_TEXT, vision_config=_IMAGES, projection_dim=16)
    )


def _clip_tower() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**_IMAGES, projection_dim=16)
    return transformers.CLIPVisionModelWithProjection(config)


def _siglip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=_TEXT, vision_config=_IMAGES)
    )


def _vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.ViTModel(transformers.ViTConfig(**_IMAGES))


def _timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("resnet10t", num_classes=0)


def _torchvision() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    model = models.resnet18()
    model.fc = nn.Identity()
    return model


@pytest.mark.parametrize("build", [_clip, _clip_tower, _siglip, _vit, _timm, _torchvision])
def test_the_encoder_comes_back_changed_and_of_its_class(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build().eval()
    options = _OPTIONS | ({"input_shape": (3, 32, 32)} if build in (_timm, _torchvision) else {})
    images = noise_images(resolve_spec(encoder, (3, 32, 32), 0.5, 0.5), 6)
    with torch.no_grad():
        embeddings = embed_images(encoder, images).flatten(1)
    centred = embeddings - embeddings.mean(0)
    model = EmbeddingClassifier(encoder, centred)  # as different as an untrained encoder allows
    run = zsu_fast.ZeroShotUnlearner(model, [2], **options)
    rows = replace(FEW_ROWS, scenes=512, steps=3, factors=(1.0,), leak=1.0, stranger=True)
    monkeypatch.setattr(run.options, "deep_settings", lambda *_: rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", zsu_fast.UnlearningWarning)  # untrained: nothing is right
        result: Any = run.run()
    assert type(result.encoder) is type(encoder)
    changed = {
        name for name, p in encoder.named_parameters()
        if not torch.equal(p, result.encoder.get_parameter(name))
    }  # fmt: skip
    assert changed
    assert not any(name.startswith("text_model") for name in changed)
    assert changed == {n.removeprefix("encoder.") for n in run.record.split["trained"]}

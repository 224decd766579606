"""Input specs of models whose layers, configs and processors say different things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zsu_fast import ClassImpressions, InputSpec
from zsu_fast.evaluation.report.pictures import pixels
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.models.input_spec import processor_spec

# --- timm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_of_timms_layers(channels: int) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", in_chans=channels)
    spec = resolve_spec(model)
    assert spec.shape == (channels, 176, 176)
    assert spec.mean == pytest.approx((sum((0.485, 0.456, 0.406)) / 3,) * channels)
    assert spec.assumed
    assert f"averaged for {channels} channels" in spec.source


def test_size_of_timms_layers() -> None:
    timm = pytest.importorskip("timm")
    spec = resolve_spec(timm.create_model("vit_tiny_patch16_224", img_size=96, depth=1))
    assert spec.shape == (3, 96, 96)
    assert not spec.assumed


# --- transformers ----------------------------------------------------------------------------


def folder(path: Path, model: Any, processor: dict[str, Any]) -> Any:
    model.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return type(model).from_pretrained(path)


def test_a_processor_of_another_size_at_which_the_model_runs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    model = folder(
        tmp_path, transformers.Dinov2ForImageClassification(config),
        {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "do_center_crop": True,
         "size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}},
    )  # fmt: skip
    spec = resolve_spec(model)
    assert (spec.shape, spec.resize, spec.assumed) == ((3, 28, 28), (32,), False)
    assert "config says (56, 56)" in spec.source


def test_a_mobilevit_does_not_normalise_and_takes_blue_first(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[8, 8, 8], neck_hidden_sizes=[8] * 7, num_attention_heads=2
    )
    published = {
        "crop_size": {"height": 64, "width": 64}, "do_center_crop": True, "resample": 2,
        "do_flip_channel_order": True, "do_resize": True, "size": {"shortest_edge": 72},
        "feature_extractor_type": "MobileViTFeatureExtractor",
    }  # fmt: skip
    model = folder(tmp_path, transformers.MobileViTForImageClassification(config), published)
    spec = resolve_spec(model)
    assert (spec.mean, spec.std, spec.bgr) == ((0, 0, 0), (1, 1, 1), True)
    assert (spec.shape, spec.resize) == ((3, 64, 64), (72,))
    assert resolve_spec(model, mean=0.0, std=1.0).bgr  # the order stays what the model states


@pytest.mark.parametrize(
    "name",
    ["MobileViTImageProcessor", "EfficientNetImageProcessor", "BitImageProcessor",
     "ViTImageProcessor", "LevitImageProcessor"],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"rescale_factor": 1 / 127.5}, {"do_normalize": False}])
def test_pixels_are_as_the_processor_makes_them(name: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    # EfficientNet's divides by std a second time, also without do_normalize, which nobody uses
    if name.startswith("EfficientNet") and "do_normalize" in options:
        options = {"rescale_factor": 1 / 127.5, "rescale_offset": True}
    side = {"height": 8, "width": 8}
    processor = getattr(transformers, name)(size=side, crop_size=side, resample=0, **options)
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    want = processor(
        list(images), return_tensors="pt", input_data_format="channels_first", do_resize=False,
        do_center_crop=False,
    )["pixel_values"]  # fmt: skip
    spec = processor_spec(json.loads(processor.to_json_string()))
    assert torch.allclose(spec.normalise(images), want, atol=1e-5)


# --- channels in reverse order ---------------------------------------------------------------

BGR = InputSpec((3, 4, 4), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), bgr=True)


def test_photos_and_pictures_of_a_bgr_model() -> None:
    pil = pytest.importorskip("PIL.Image")
    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 255
    images = BGR.normalise(red)
    assert torch.allclose(images[0, :, 0, 0] * torch.tensor(BGR.std) + torch.tensor(BGR.mean),
                          torch.tensor([0.0, 0.0, 1.0]), atol=1e-6)  # fmt: skip
    photo = pil.new("RGB", (4, 4), (255, 0, 0))
    assert torch.allclose(BGR.transform()(photo), images[0], atol=1e-6)
    shown = pixels(images, BGR)
    assert shown is not None
    assert torch.equal(shown, red)


def test_impressions_remember_the_order(tmp_path: Path) -> None:
    one = torch.ones(1)
    impressions = ClassImpressions(
        images=torch.zeros(1, 3, 4, 4), labels=torch.zeros(1, dtype=torch.int64), confidence=one,
        target=one, steps=one.long(), hit=one.bool(), spec=BGR,
    )  # fmt: skip
    impressions.save(tmp_path / "impressions.safetensors")
    assert ClassImpressions.load(tmp_path / "impressions.safetensors").spec.bgr

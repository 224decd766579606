"""Models by name: they state their images, and weights are never silently random."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zsu_fast.errors import ArgumentError, CheckpointError, UnlearningWarning
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
    with pytest.raises(ArgumentError, match=r"input_shape: .*it is unknown which.*Pass input_sha"):
        resolve_spec(anywhere)
    assert resolve_spec(anywhere, (3, 32, 32)).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["torchvision:nonet", "timm:nonet", "nonet"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ArgumentError, match="nonet"):
        load_model(name, "pretrained")


# --- factories ---------------------------------------------------------------------------------


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with good and bad factories."""
    name = f"factories_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import sys\n"
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, classes=3):\n"
        "        super().__init__(4, classes)\n"
        "class Space:\n"
        "    make = staticmethod(Net)\n"
        "instance, number = Net(), 3\n"
        "def raises():\n"
        "    nn.Linear(4, 'many')\n"
        "def leaves():\n"
        "    sys.exit('usage: train.py')\n"
        "def needs(classes, *, width):\n"
        "    return Net(classes)\n"
        "def no_module():\n"
        "    return {}\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("raise OSError('no \x1b[31msuch disk')\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("raises", r"raises raises TypeError: .*line 10 of .*factories_"),
        ("leaves", r"leaves raises SystemExit: usage"),
        ("needs", r"needs needs arguments \(classes, width\).*without required arguments"),
        ("number", r"is a int, neither a function nor a module"),
        ("no_module", r"returned a dict\. Return a torch\.nn\.Module"),
        ("missing", r"can't be imported \(AttributeError"),
    ],
)
def test_a_factory_that_gives_no_model(factories: str, attribute: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"^model: .*{words}"):
        load_model(f"{factories}:{attribute}")


def test_a_module_that_raises_when_imported(factories: str) -> None:
    with pytest.raises(ArgumentError, match=r"can't be imported \(OSError: no such disk\)"):
        load_model(f"{factories}_broken:make")


def test_a_module_instance_is_copied(factories: str) -> None:
    model, again = (load_model(f"{factories}:instance") for _ in range(2))
    assert torch.equal(model.weight, again.weight)
    with torch.no_grad():
        model.weight.zero_()
    assert again.weight.abs().sum() > 0
    assert load_model(f"{factories}:instance").weight.abs().sum() > 0


def test_a_module_class_without_weights_is_built_with_a_warning(
    factories: str, tmp_path: Path
) -> None:
    saved = nn.Linear(4, 3)
    checkpoint.save_weights(tmp_path / "a.pt", saved)
    for name in ("Net", "Space.make"):
        with pytest.warns(UnlearningWarning, match=r"is a class: .*random as a rule"):
            load_model(f"{factories}:{name}")
        model = load_model(f"{factories}:{name}", str(tmp_path / "a.pt"))
        assert torch.equal(model.weight, saved.weight)


# --- what the libraries know about their own files ---------------------------------------------


def test_a_training_checkpoint_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    saved = timm.create_model("resnet10t", num_classes=4)
    averaged = {n: t + 1 for n, t in saved.state_dict().items()}
    optimiser = torch.optim.SGD(saved.parameters(), 0.1, momentum=0.9)
    torch.save(
        {"epoch": 3, "arch": "resnet10t", "state_dict": saved.state_dict(),
         "optimizer": optimiser.state_dict(), "version": 2, "amp_scaler": {"scale": 65536.0},
         "args": argparse.Namespace(model="resnet10t", mean=None, opt="sgd"),
         "state_dict_ema": averaged, "metric": np.float64(71.5)},
        tmp_path / "last.pth.tar",
    )  # fmt: skip
    path = tmp_path / "last.pth.tar"
    with pytest.warns(UnlearningWarning, match=r"'state_dict' were taken, not .*_ema'; choose"):
        model = load_model("timm:resnet10t", str(path), classes=4)
    assert torch.equal(model.fc.weight, saved.fc.weight)
    model = load_model("timm:resnet10t", f"{path}::state_dict_ema", classes=4)
    assert torch.equal(model.fc.weight, averaged["fc.weight"])


def test_the_file_is_of_another_architecture_with_the_same_tensors(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    state = timm.create_model("resnet10t", num_classes=4).state_dict()
    torch.save({"arch": "resnet10x", "state_dict": state}, tmp_path / "a.pth")
    with pytest.warns(UnlearningWarning, match=r"of 'resnet10x', and the model is 'resnet10t'"):
        load_model("timm:resnet10t", str(tmp_path / "a.pth"), classes=4)
    torch.save({"arch": "resnet10t.c3_in1k", "state_dict": state}, tmp_path / "b.pth")
    load_model("timm:resnet10t", str(tmp_path / "b.pth"), classes=4)  # without a warning


def test_names_that_timm_translates(tmp_path: Path) -> None:
    """ConvNeXt as its authors name it, in a DataParallel checkpoint."""
    timm = pytest.importorskip("timm")
    saved = timm.create_model("convnext_atto", num_classes=3)
    nn.init.normal_(saved.head.fc.bias)
    state = {}
    for name, tensor in saved.state_dict().items():
        name = name.replace("head.fc.", "head.").replace("head.norm", "norm")
        name = re.sub(r"stages.(\d+).blocks.(\d+)", r"stages.\1.\2", name)
        name = re.sub(r"stages.(\d+).downsample.(\d+)", r"downsample_layers.\1.\2", name)
        name = name.replace("stem.", "downsample_layers.0.").replace("conv_dw", "dwconv")
        state["module." + name.replace("mlp.fc", "pwconv")] = tensor
    torch.save({"model": state}, tmp_path / "a.pth")
    with pytest.warns(UnlearningWarning, match="translated .timm's checkpoint filter"):
        model = load_model("timm:convnext_atto", str(tmp_path / "a.pth"), classes=3)
    assert all(torch.equal(t, saved.state_dict()[n]) for n, t in model.state_dict().items())


def test_names_of_older_torchvision_files(tmp_path: Path) -> None:
    """DenseNet's from before torch 0.4; AlexNet's from torch's own ImageNet example."""
    models = pytest.importorskip("torchvision.models")
    dense = models.densenet121(num_classes=3)
    parts = models.squeezenet1_0(num_classes=3)
    for model, name, state, by in (
        (dense, "densenet121",
         {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", n): t
          for n, t in dense.state_dict().items()}, "DenseNet"),
        (parts, "squeezenet1_0",
         {n.replace("features.", "features.module."): t
          for n, t in parts.state_dict().items()}, "DataParallel"),
    ):  # fmt: skip
        torch.save({"state_dict": state}, tmp_path / "a.pth")
        with pytest.warns(UnlearningWarning, match=f"translated .*{by}"):
            loaded = load_model(f"torchvision:{name}", str(tmp_path / "a.pth"), classes=3)
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[key])


def test_a_published_file_of_torchvision_states_its_own_images(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    entry = models.MobileNet_V2_Weights.IMAGENET1K_V1
    path = tmp_path / Path(entry.url).name
    torch.save(models.mobilenet_v2().state_dict(), path)
    assert resolve_spec(load_model("mobilenet_v2", str(path))).resize == (256,)
    path.rename(tmp_path / "mine.pth")
    assert resolve_spec(load_model("mobilenet_v2", str(tmp_path / "mine.pth"))).resize == (232,)

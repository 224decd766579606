"""The real images and public weights beside the repository (``../shared/data``)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zsu_fast.models import checkpoint, loading, zoo
from zsu_fast.models.infer_spec import resolve_spec

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

Data = tuple[Tensor, Tensor]


def loaders() -> Any:
    """The module ``load.py`` of the shared data."""
    if str(SHARED) not in sys.path:
        sys.path.insert(0, str(SHARED))
    import load

    return load


def load_model(name: str) -> nn.Module:
    """Loads a zoo model with the weights that ship, or a model with public weights."""
    if name not in zoo.ZOO:
        return loading.load_model(name, str(SHARED / "models" / f"{name}.safetensors"))
    if zoo.ZOO[name].weights is not None:
        return zoo.load(name)
    model = zoo.build(name)
    file = f"cifar10_{name.removesuffix('_cifar')}.safetensors"
    checkpoint.load_into(model, SHARED / "models" / file)
    return model


def load_split(name: str, split: str, most: int | None = None) -> Data:
    """The first ``most`` images of a split (in no order of classes), or all; uint8, and labels."""
    images, labels = getattr(loaders(), name)(split)
    return images[:most], labels[:most]


def load_data(model: nn.Module, name: str) -> Data:
    """All test images of a data set, normalised for ``model``, and labels."""
    images, labels = loaders().imagenet_sample() if name == "imagenet" else load_split(name, "test")
    return resolve_spec(model).normalise(images), labels

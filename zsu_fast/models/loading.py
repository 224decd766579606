"""Builds a model from its name and loads its weights.

A name refers to the zoo, torchvision, timm, a transformers folder, or ``module:factory``.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError
from . import checkpoint, zoo
from .input_spec import torchvision_spec

PRETRAINED = "pretrained"


def load_model(name: str, weights: str | None = None, classes: int | None = None) -> nn.Module:
    """Builds the model called ``name`` and loads its weights.

    Args:
        name: a zoo name ("lenet5"), a torchvision or timm name ("resnet50", or "torchvision:..."
            and "timm:..." to choose), "hf:folder" (a transformers image classifier written by
            ``save_pretrained``; nothing is downloaded), or "package.module:factory" (a function
            without required arguments that returns an ``nn.Module``).
        weights: a safetensors file, or a checkpoint that ``torch.load(weights_only=True)`` accepts;
            "pretrained", or the name of a torchvision weights entry, lets torchvision or timm
            download theirs; None takes the weights of the zoo, the folder, or the factory.
        classes: number of logits of a torchvision or timm model; None for its default.

    Raises:
        ArgumentError: no such model, or no weights are given for a model that has none.
        CheckpointError: the file can't be read, or does not fit the model.
    """
    source, _, rest = name.partition(":")
    libraries = ("torchvision", "timm")
    if classes is not None and (name in zoo.ZOO or (rest and source not in libraries)):
        raise ArgumentError(
            "classes",
            f"got {classes} for {name!r}, whose number of logits is fixed",
            "Leave it out; it is for torchvision and timm models.",
        )
    if name in zoo.ZOO:
        return zoo.load(name) if weights is None else _with_file(zoo.build(name), weights)
    if source == "torchvision":
        return _torchvision(rest, weights, classes)
    if source == "timm":
        return _timm(rest, weights, classes)
    if source == "hf":
        return _transformers(rest, weights)
    if rest:
        return _with_file(_factory(source, rest), weights)
    for build in (_torchvision, _timm):
        try:
            return build(name, weights, classes)
        except _Unknown:
            continue
    raise ArgumentError(
        "model",
        f"got {name!r}, which is in neither the zoo nor an installed torchvision or timm",
        f"Pass one of {', '.join(zoo.ZOO)}, a torchvision or timm name (pip install "
        f"'zsu-fast[models]'), hf:folder, or module:factory.",
    )


class _Unknown(ArgumentError):
    """The library has no model of this name."""


def _with_file(model: nn.Module, weights: str | None) -> nn.Module:
    if weights is not None:
        checkpoint.load_into(model, weights)
    return model.eval()


def _torchvision(name: str, weights: str | None, classes: int | None) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise _unknown(name, "torchvision", f"torchvision can't be imported: {error}") from error
    if name not in models.list_models(module=models):
        raise _unknown(name, "torchvision", "it has no image classifier of this name")
    entries = models.get_model_weights(name)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    _need_weights(name, weights)
    default = entries["DEFAULT"]
    chosen = default if weights == PRETRAINED else entries.__members__.get(weights)
    model = models.get_model(name, weights=chosen, **options)
    model.input_spec = torchvision_spec((chosen or default).transforms())
    return _with_file(model, weights if chosen is None else None)


def _timm(name: str, weights: str | None, classes: int | None) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise _unknown(name, "timm", f"timm can't be imported: {error}") from error
    if not timm.is_model(name):
        raise _unknown(name, "timm", "it has no model of this name")
    _need_weights(name, weights)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    model = timm.create_model(name, pretrained=weights == PRETRAINED, **options)
    return _with_file(model, None if weights == PRETRAINED else weights)


def _transformers(folder: str, weights: str | None) -> nn.Module:
    try:
        from transformers import AutoModelForImageClassification
    except ImportError as error:
        raise ArgumentError(
            "model",
            f"got 'hf:{folder}', and transformers can't be imported ({error})",
            "Run pip install 'zsu-fast[models]'.",
        ) from error
    if not (Path(folder) / "config.json").is_file():
        raise ArgumentError(
            "model",
            f"got 'hf:{folder}', a folder without config.json",
            "Name a local folder written by save_pretrained(); nothing is downloaded.",
        )
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            "model",
            f"got 'hf:{folder}', which transformers can't load ({type(error).__name__}: {error})",
            "Save an image classifier there with save_pretrained().",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing and weights is None:
        raise ArgumentError(
            "weights",
            f"'hf:{folder}' has none for {missing[:3]}, which would be random",
            "Save the whole trained classifier there, not only its backbone.",
        )
    return _with_file(model, weights)


def _factory(module: str, attribute: str) -> nn.Module:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with `python -m`; a console script does not do this
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(
            "model",
            f"got '{module}:{attribute}', which can't be imported ({error})",
            "Pass package.module:factory, importable from the current folder.",
        ) from error
    model = factory()
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            "model",
            f"{module}:{attribute} returned a {type(model).__name__}",
            "Return a torch.nn.Module from it.",
        )
    return model


def _need_weights(name: str, weights: str | None) -> None:
    if weights is None:
        raise ArgumentError(
            "weights",
            f"not given, so {name!r} would have random ones, with nothing to forget",
            f"Pass a safetensors or checkpoint file, or {PRETRAINED!r} to download weights.",
        )


def _unknown(name: str, source: str, why: str) -> _Unknown:
    return _Unknown("model", f"got {name!r} for {source}: {why}", "Check the spelling.")

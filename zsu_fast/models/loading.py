"""Builds a model from its name and loads its weights.

A name refers to the zoo, torchvision, timm, a transformers folder, or ``module:factory``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError, CheckpointError, UnlearningWarning
from . import checkpoint, folder_config, zoo
from .compact_file import fit_to_file
from .headless import remove_classifier
from .input_spec import torchvision_spec
from .parameters import deep_copy
from .stated_labels import PUBLISHED

PRETRAINED = "pretrained"


def load_model(
    name: str, weights: str | None = None, classes: int | None = None, encoder: bool = False
) -> nn.Module:
    """Builds the model called ``name`` and loads its weights.

    Args:
        name: a zoo name ("lenet5"), a torchvision or timm name ("resnet50", or "torchvision:..."
            and "timm:..." to choose), "hf:folder" (an image classifier in a folder written by
            `zsu_fast.save_pretrained`, transformers' ``save_pretrained``, or timm's
            ``save_for_hf``; nothing is downloaded), or "package.module:factory" (a function without
            required arguments that returns an ``nn.Module``, or a module itself).
        weights: a safetensors file, or a checkpoint that ``torch.load(weights_only=True)`` accepts,
            as for `checkpoint.load_into` ("last.pt::state_dict_ema"); "pretrained", or the name of
            a torchvision weights entry, lets torchvision or timm download theirs; None takes the
            weights of the zoo, the folder, or the factory. A file of a compact model
            (``--compact``) says which classes it kept: the model is built with all of them, and
            cut.
        classes: number of logits of a torchvision or timm model; None for its default. 0 for a timm
            model without a classifier.
        encoder: return an encoder of images: a zoo, torchvision or timm model without its last
            linear layer (`remove_classifier`), whose weights the file may hold or not; of
            a transformers folder, the base model; what a factory returns stays as it is.

    Raises:
        ArgumentError: no such model, the factory raises, or no weights are given for a model that
            has none.
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
        model = zoo.load(name) if weights is None else zoo.build(name)
        return _with_file(model, weights, encoder=encoder)
    if source == "torchvision":
        return _torchvision(rest, weights, classes, encoder)
    if source == "timm":
        return _timm(rest, weights, classes, encoder)
    if source == "hf":
        return _folder(rest, weights, encoder)
    if rest:
        return _with_file(_factory(source, rest, weights), weights)
    for build in (_torchvision, _timm):
        try:
            return build(name, weights, classes, encoder)
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


def _with_file(
    model: nn.Module, weights: str | None, name: str = "", encoder: bool = False
) -> nn.Module:
    """Loads the file, if one is given; ``name`` is that of the architecture in its library.

    With ``encoder``, removes the classifier, whose weights the file may hold or not.
    """
    if weights is not None:
        fit_to_file(model, weights)
        _check_arch(weights, name, _load_into(model, weights, encoder).arch)
    elif encoder:
        remove_classifier(model)
    return model.eval()


def _load_into(model: nn.Module, weights: str, encoder: bool) -> checkpoint.Origin:
    """`checkpoint.load_into`; of an encoder, with its classifier's weights or without."""
    try:
        found = checkpoint.load_into(model, weights)
    except CheckpointError as error:
        if not encoder:
            raise
        remove_classifier(model)
        try:
            return checkpoint.load_into(model, weights)
        except CheckpointError:
            raise error from None
    if encoder:
        remove_classifier(model)
    return found


def _check_arch(weights: str, name: str, arch: str) -> None:
    """Warns if the file states another architecture than ``name``."""
    if name and arch and arch.partition(".")[0] != name.partition(".")[0]:
        warnings.warn(
            f"weights: {weights} states that it is of {arch!r}, and the model is {name!r}. "
            f"Their tensors have the same names and shapes, but they may compute otherwise.",
            UnlearningWarning,
            stacklevel=4,
        )


def _torchvision(
    name: str, weights: str | None, classes: int | None, encoder: bool = False
) -> nn.Module:
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
    published = _published(entries, weights)
    if published is not None and name in ("googlenet", "inception_v3"):
        options["transform_input"] = True  # as torchvision sets it for these weights
    model = models.get_model(name, weights=chosen, **options)
    model.input_spec = torchvision_spec((chosen or published or default).transforms())
    if chosen is not None or published is not None:
        model.weights_source = PUBLISHED
    return _with_file(model, weights if chosen is None else None, name, encoder)


def _published(entries: Any, weights: str | None) -> Any:
    """The torchvision entry of which the file ``weights`` is a copy, by its name; None if none."""
    file = Path(str(weights).partition("::")[0]).name
    return next((entry for entry in entries if Path(entry.url).name == file), None)


def _timm(name: str, weights: str | None, classes: int | None, encoder: bool = False) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise _unknown(name, "timm", f"timm can't be imported: {error}") from error
    if not timm.is_model(name):
        raise _unknown(name, "timm", "it has no model of this name")
    _need_weights(name, weights)
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    model = timm.create_model(name, pretrained=weights == PRETRAINED, **options)
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    file = Path(str(weights).partition("::")[0]).name
    if weights == PRETRAINED or file == Path(config.get("url") or "unknown").name:
        model.weights_source = PUBLISHED  # type: ignore[assignment]
    own = None if weights == PRETRAINED else weights
    return _with_file(model, own, name, encoder and classes != 0)


def _folder(folder: str, weights: str | None, encoder: bool = False) -> nn.Module:
    """A model in a folder of the format of transformers, of timm, or of this package."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ArgumentError(
            "model",
            f"got 'hf:{folder}', a folder without config.json",
            "Name a local folder written by save_pretrained(); nothing is downloaded.",
        )
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(
            "model", f"got 'hf:{folder}', whose config.json can't be read ({error})",
            "Save the model there again.",
        ) from error  # fmt: skip
    if isinstance(config, dict) and folder_config.KEY in config:
        model = folder_config.from_config(config)
        return _with_file(model, weights or str(path / "model.safetensors"), encoder=encoder)
    if isinstance(config, dict) and "architecture" in config and "model_type" not in config:
        return _timm_folder(folder, weights, encoder)
    return _transformers(folder, weights, encoder)


def _timm_folder(folder: str, weights: str | None, encoder: bool) -> nn.Module:
    try:
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=weights is None)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError, KeyError) as error:
        raise ArgumentError(
            "model",
            f"got 'hf:{folder}', which timm can't load ({type(error).__name__}: {error})",
            "Save an image classifier there, with config.json and model.safetensors.",
        ) from error
    classified = getattr(model, "num_classes", None) != 0
    return _with_file(model, weights, encoder=encoder and classified)


def _transformers(folder: str, weights: str | None, encoder: bool) -> nn.Module:
    kind = "encoder" if encoder else "classifier"
    try:
        from transformers import AutoModel, AutoModelForImageClassification
    except ImportError as error:
        raise ArgumentError(
            "model",
            f"got 'hf:{folder}', and transformers can't be imported ({error})",
            "Run pip install 'zsu-fast[models]'.",
        ) from error
    try:
        auto = AutoModel if encoder else AutoModelForImageClassification
        model, info = auto.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            "model",
            f"got 'hf:{folder}', which transformers can't load ({type(error).__name__}: {error})",
            f"Save an image {kind} there with save_pretrained().",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing and weights is None:
        raise ArgumentError(
            "weights",
            f"'hf:{folder}' has none for {missing[:3]}, which would be random",
            f"Save the whole trained {kind} there, not only a part of it.",
        )
    return _with_file(model, weights)


def _factory(module: str, attribute: str, weights: str | None) -> nn.Module:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with `python -m`; a console script does not do this
    name = f"{module}:{attribute}"
    try:
        factory: Any = importlib.import_module(module)
        for part in attribute.split("."):
            factory = getattr(factory, part)
    except (Exception, SystemExit) as error:  # some modules read the command line
        raise ArgumentError(
            "model",
            f"got {name!r}, which can't be imported ({_reason(error)})",
            "Pass package.module:factory, importable from the current folder.",
        ) from error
    if isinstance(factory, nn.Module):  # the caller may change what it gets
        return deep_copy(factory, f"Let {name} be a function that builds the model.")
    _check_callable(name, factory)
    if isinstance(factory, type) and weights is None:
        warnings.warn(
            f"weights: not given, and {name} is a class: its weights are those that __init__ sets, "
            f"random as a rule. Pass a file, or a function that loads one.",
            UnlearningWarning,
            stacklevel=3,
        )
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise ArgumentError(
            "model",
            f"{name} raises {_reason(error)}{_place(error)}",
            "Call it without arguments in Python to see the whole error, and mend it there.",
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            "model",
            f"{name} returned a {type(model).__name__}",
            "Return a torch.nn.Module from it.",
        )
    return model


def _check_callable(name: str, factory: Any) -> None:
    """Raises unless ``factory`` can be called without arguments."""
    if not callable(factory):
        raise ArgumentError(
            "model",
            f"{name} is a {type(factory).__name__}, neither a function nor a module",
            "Name a function without required arguments that returns a torch.nn.Module.",
        )
    try:
        signature = inspect.signature(factory)
    except (ValueError, TypeError):  # of some builtins: calling it will tell
        return
    needed = [
        p.name for p in signature.parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]  # fmt: skip
    if needed:
        raise ArgumentError(
            "model",
            f"{name} needs arguments ({', '.join(needed)}), and is called without any",
            f"Name a function without required arguments, such as "
            f"def make(): return {factory.__name__}(...).",
        )


def _reason(error: BaseException) -> str:
    text = " ".join(checkpoint.printable(str(error)).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _place(error: BaseException) -> str:
    """The line of the user's code at which it raised, or "" if that is not known."""
    _, *frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f" (line {own[-1].lineno} of {own[-1].filename})" if own else ""


def _need_weights(name: str, weights: str | None) -> None:
    if weights is None:
        raise ArgumentError(
            "weights",
            f"not given, so {name!r} would have random ones, with nothing to forget",
            f"Pass a safetensors or checkpoint file, or {PRETRAINED!r} to download weights.",
        )


def _unknown(name: str, source: str, why: str) -> _Unknown:
    return _Unknown("model", f"got {name!r} for {source}: {why}", "Check the spelling.")

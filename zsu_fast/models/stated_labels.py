"""What a model itself states about the names of its classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ArgumentError
from .embedding_classifier import as_embedding_classifier
from .input_spec import torchvision_entry
from .label_set import WORDNET_ID, Labels, make_labels
from .parameters import unwrap

# What `weights_source` of a model says that `load_model` gave the weights that its library
# publishes for it, so that what the library states of their classes is true of the model.
PUBLISHED = "published by the model's library"
# Numbers of classes of the ImageNet variants, by their names in the tags of timm's weights.
_TIMM_TAGS = {"in1k": (1000,), "in12k": (11821,), "in21k": (11221, 21843), "in22k": (21841, 21842)}
# Attributes in which models, also those of ultralytics and mmpretrain, keep their classes' names.
_ATTRIBUTES = ("class_names", "categories", "classes", "CLASSES", "names")


def known_labels(model: nn.Module, classes: int | None = None) -> Labels | None:
    """Returns what the model itself states about its classes, or None.

    The first of these counts: an attribute such as ``class_names``, ``id2label`` of a transformers
    config (unless it is the default LABEL_0, LABEL_1, ...), timm's ``pretrained_cfg`` (its
    ``label_names``, or the ImageNet variant that its tag names, as in "ra_in1k"), and the
    ``categories`` of the torchvision weights that fit the model. The last two describe weights that
    the library publishes: `Labels.assumed` says so unless the model's are known to be those
    (``weights_source``). Wrappers are looked through. Of an
    `EmbeddingClassifier`, its names count, and none of its encoder's.
    """
    if (classifier := as_embedding_classifier(model)) is not None:
        named = classifier.class_names
        if named is None or (classes is not None and len(named) != classes):
            return None
        return Labels(tuple(named), "the gallery", given=True)
    for module in _wrapped(model):
        for read in (_from_attribute, _from_transformers, _from_timm, _from_torchvision):
            labels = read(module, classes)
            if labels is not None and (classes is None or len(labels) == classes):
                return labels
    return None


def _wrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model, and the module that it wraps, if only one of its children has parameters."""
    module: nn.Module | None = unwrap(model)
    while module is not None:
        yield module
        inner = [c for c in module.children() if next(c.parameters(), None) is not None]
        own = next(module.parameters(recurse=False), None) is not None
        module = unwrap(inner[0]) if len(inner) == 1 and not own else None


def _stated(value: Any, source: str) -> Labels | None:
    """`Labels` of what a model has in an attribute; None if that is something else."""
    if not isinstance(value, list | tuple | Mapping):
        return None
    try:
        found = make_labels(value, source, None)
    except ArgumentError:
        return None
    return Labels(found.names, source, found.ids)


def _from_attribute(model: nn.Module, classes: int | None) -> Labels | None:
    for name in _ATTRIBUTES:
        labels = _stated(getattr(model, name, None), f"the model's {name}")
        if labels is not None and (classes is None or len(labels) == classes):
            return labels
    return None


def _from_transformers(model: nn.Module, _classes: int | None) -> Labels | None:
    config = getattr(model, "config", None)
    labels = _stated(getattr(config, "id2label", None), "the model's id2label")
    if labels is None or all(name == f"LABEL_{i}" for i, name in enumerate(labels.names)):
        return None
    inverse = getattr(config, "label2id", None) or {}
    if set(inverse) == set(labels.names):
        for index, name in enumerate(labels.names):
            if labels.names.count(name) == 1 and str(inverse[name]) != str(index):
                return None  # the two contradict each other
    return labels


def _from_timm(model: nn.Module, classes: int | None) -> Labels | None:
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict):
        return None
    if (ids := config.get("label_names")) is not None:
        names, source = config.get("label_descriptions"), "the model's pretrained_cfg"
        if isinstance(names, Mapping) and set(names) == set(ids):
            names = [names[i] for i in ids]
        labels = _stated(list(ids if names is None else names), source)
        if labels is None or len(labels) != len(ids):
            return None
        return Labels(labels.names, source, _wordnet_only(ids))
    count = getattr(model, "num_classes", None)
    if count != config.get("num_classes") or (classes is not None and count != classes):
        return None
    try:
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
    except ImportError:
        return None
    subset, tag = infer_imagenet_subset(model), str(config.get("tag"))
    variants = re.findall(r"in\d+k", tag)  # of "augreg_in21k_ft_in1k", the last one
    if subset is None or not variants or count not in _TIMM_TAGS.get(variants[-1], ()):
        return None
    info = ImageNetInfo(subset)
    ids = tuple(info.label_names())
    weights = f"timm's weights {config.get('architecture')}.{tag}"
    names = tuple(map(info.label_name_to_description, ids))
    return Labels(names, f"{subset}, by {weights}", ids, assumed=_assumed(model, weights))


def _wordnet_only(ids: Iterable[Any]) -> tuple[str, ...]:
    texts = tuple(map(str, ids))
    return texts if all(map(WORDNET_ID.fullmatch, texts)) else ()


def _from_torchvision(model: nn.Module, _classes: int | None) -> Labels | None:
    entry = torchvision_entry(model)
    names = None if entry is None else entry.meta.get("categories")
    labels = _stated(names, f"the categories of torchvision's weights {entry}")
    if labels is None:
        return None
    return replace(labels, assumed=_assumed(model, f"torchvision's weights {entry}"))


def _assumed(model: nn.Module, weights: str) -> str:
    """Why the names of the classes of ``weights`` may not be the model's, or ""."""
    if getattr(model, "weights_source", None) == PUBLISHED:
        return ""
    return (
        f"they are those of {weights}, which have the model's architecture and number of classes; "
        f"whether its own weights are these or trained on other classes is not known"
    )

"""One pass over images: every model's predictions and logits, and the inputs of its layers.

A data set may thus be an iterator that is read once, and each backbone runs once per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...runtime.hooks import forward_pre_hooks
from ..labelled_data import LabelledData
from ..run_model import check_logits
from .audited_model import AuditedModel

# A layer's input is pooled to at most this many numbers per image, the last layer's to the second.
_WIDTH, _LAST_WIDTH = 512, 4096
# Layers that are measured in a deep model, including the last one.
_MAX_LAYERS = 8
# Images per batch where the data is a pair of tensors.
_BATCH = 250


@dataclass
class Activations:
    """The outputs and activations of several models on one set of images.

    Attributes:
        labels: int64 [N].
        logits: model's name -> float32 [N, C].
        predictions: model's name -> int64 [N], also for models without stored logits.
        among_forgotten: model's name -> int64 [N], the forgotten class with the largest logit.
        feature_index: int64 [M], the images whose features are stored: the first few per class.
        features: model's name -> layer's name -> float32 [M, D], the layer's (pooled) input.
        last_layer: model's name -> the name of its last layer, a key of ``features``.
        image_index: int64 [K], the images that are stored themselves.
        images: float32 [K, ...].
    """

    labels: Tensor
    logits: dict[str, Tensor]
    predictions: dict[str, Tensor]
    among_forgotten: dict[str, Tensor]
    feature_index: Tensor
    features: dict[str, dict[str, Tensor]]
    last_layer: dict[str, str]
    image_index: Tensor
    images: Tensor

    def penultimate(self, name: str) -> Tensor:
        """Returns the input of the model's last layer, [M, D]."""
        return self.features[name][self.last_layer[name]]


@torch.no_grad()
def collect_activations(
    batches: Iterable[tuple[Tensor, Tensor]],
    models: list[AuditedModel],
    variants: list[AuditedModel],
    forget: list[int],
    features_per_class: int,
    images_per_class: dict[int, int] | None = None,
) -> Activations:
    """Runs every model on the batches and collects what the audit measures.

    Args:
        batches: (images float [n, ...], labels int64 [n]).
        models: models whose logits and features are stored.
        variants: models of which only the predictions are stored.
        forget: the forgotten classes.
        features_per_class: store the features of at most this many images per class.
        images_per_class: class -> store at most this many images.
    """
    groups: dict[str, list[AuditedModel]] = {}
    for audited in [*models, *variants]:
        groups.setdefault(audited.backbone_hash, []).append(audited)
    stored = {m.name for m in models}
    logits: dict[str, list[Tensor]] = {name: [] for name in stored}
    predictions: dict[str, list[Tensor]] = {m.name: [] for m in [*models, *variants]}
    among: dict[str, list[Tensor]] = {name: [] for name in predictions}
    forgotten = torch.tensor(forget)
    pooled: dict[str, dict[str, list[Tensor]]] = {key: {} for key in groups}
    labels, feature_index, image_index, images = [], [], [], []
    total = 0
    feature_count: dict[int, int] = {}
    image_count: dict[int, int] = {}
    for batch, label in batches:
        rows = _first_per_class(label, feature_count, lambda _c: features_per_class)
        shown = _first_per_class(label, image_count, lambda c: (images_per_class or {}).get(c, 0))
        x = batch.to(models[0].device)
        for key, group in groups.items():
            pooled_rows = rows if any(m.name in stored for m in group) else rows[:0]
            with _collect_inputs(group[0], pooled[key], pooled_rows, len(label)):
                features = group[0].split.backbone(x)
                out = group[0].logits(features)
            for audited in group:
                if audited is not group[0]:
                    out = audited.logits(features)
                check_logits(out, audited.name)
                predictions[audited.name].append(out.argmax(1).cpu())
                among[audited.name].append(forgotten[out[:, forget].argmax(1).cpu()])
                if audited.name in stored:
                    logits[audited.name].append(out.float().cpu())
        labels.append(label)
        feature_index.append(total + rows)
        image_index.append(total + shown)
        images.append(batch[shown])
        total += len(label)
    joined = {key: _concatenate(layers) for key, layers in pooled.items()}
    return Activations(
        labels=torch.cat(labels),
        logits=_concatenate(logits),
        predictions=_concatenate(predictions),
        among_forgotten=_concatenate(among),
        feature_index=torch.cat(feature_index),
        features={m.name: joined[m.backbone_hash] for m in models},
        last_layer={m.name: groups[m.backbone_hash][0].layers[-1] for m in models},
        image_index=torch.cat(image_index),
        images=torch.cat(images),
    )


def _concatenate(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def normalised_batches(
    data: LabelledData, classes: int, multi_label: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields normalised images, float32 on the CPU, and labels, int64, from the data of `audit`.

    Args:
        data: matched with the model; uint8 images (0..255) are normalised, float ones are not.
        classes: the number of logits.
        multi_label: yield labels as bool [N, C].

    Raises:
        ArgumentError: see `LabelledData`.
    """
    targets = data.multi_hot_targets if multi_label else data.targets
    for images, labels in data.batches(_BATCH):
        yield images.cpu().float(), targets(labels, classes)


def sample_layers(layers: list[str]) -> list[str]:
    """Returns at most `_MAX_LAYERS` of the layers, evenly spaced, including the last one."""
    if len(layers) <= _MAX_LAYERS:
        return layers
    step = (len(layers) - 1) / (_MAX_LAYERS - 1)
    return [layers[round(i * step)] for i in range(_MAX_LAYERS)]


def pool_features(x: Tensor, width: int) -> Tensor:
    """[N, ...] -> float32 [N, D], with D at most ``width`` where pooling can reach that.

    Feature maps are averaged to 4 x 4, 2 x 2 or 1 x 1 positions, tokens to their mean.
    """
    x = x.float()
    if x.ndim == 3:
        x = x.mean(1)
    for side in (4, 2, 1):
        if x.ndim != 4 or x[0].numel() <= width:
            break
        size = (min(side, x.shape[-2]), min(side, x.shape[-1]))
        x = nn.functional.adaptive_avg_pool2d(x, size)
    return x.flatten(1)


def _collect_inputs(
    audited: AuditedModel, store: dict[str, list[Tensor]], rows: Tensor, batch: int
) -> AbstractContextManager[None]:
    """Appends the pooled input of each sampled layer, for the batch's ``rows``, to ``store``."""
    layers = sample_layers(audited.layers) if len(rows) else []
    names = {audited.model.module.get_submodule(layer): layer for layer in layers}
    done: set[str] = set()

    def hook(layer: nn.Module, args: Any, _kwargs: Any) -> None:
        name = names[layer]
        if name in done or not args or not isinstance(args[0], Tensor) or len(args[0]) != batch:
            return  # another dimension 0 is not the batch: windows, tokens
        done.add(name)
        part = args[0][rows.to(args[0].device)]
        pooled = pool_features(part, _LAST_WIDTH if name == audited.layers[-1] else _WIDTH)
        store.setdefault(name, []).append(pooled.cpu())

    return forward_pre_hooks(names, hook)


def _first_per_class(labels: Tensor, count: dict[int, int], limit: Callable[[int], int]) -> Tensor:
    """Returns the positions in ``labels`` of the first ``limit(class)`` images of each class.

    ``count``, class -> images so far, carries the counts from batch to batch.
    """
    positions = []
    for position, c in enumerate(labels.tolist()):
        if count.get(c, 0) < limit(c):
            count[c] = count.get(c, 0) + 1
            positions.append(position)
    return torch.tensor(positions, dtype=torch.int64)

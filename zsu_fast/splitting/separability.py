"""How well each layer's input tells the classes apart: where class-specific features emerge.

Data-free: measured on class impressions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.wrapper import LogitsModel
from .layers import in_chunks, layer_names

# Enough to tell layers apart; impressions of 1,000 classes at 224 pixels would take minutes.
MOST_IMAGES = 512
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fisher_ratios(model: LogitsModel, images: Tensor, labels: Tensor) -> list[tuple[str, float]]:
    """How well each layer's input tells the classes apart, in the order of the forward pass.

    The ratio of the variance between class means to the variance around them (Fisher's, as the
    traces of both scatter matrices), on impressions. Feature maps are averaged to at most 4 x 4
    positions first. Of tokens both their mean and the first one (the class token, where a model
    has one) are tried, and the better counts. 0 is none, without an upper bound.

    Args:
        model: from `working_copy`.
        images, labels: impressions; of more than 512, those of evenly spaced classes are taken.

    Returns:
        (module name, ratio) of each layer with weights.
    """
    images, labels = _sample(images, labels)
    names = layer_names(model.module, images[:2])
    modules = dict(model.module.named_modules())
    inputs: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    hooks = []
    for name in names:

        def note(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            if given is not None and len(inputs[name]) < len(chunks):  # a layer's first call counts
                inputs[name].append(_summaries(module, given, chunks[-1]))

        hooks.append(modules[name].register_forward_pre_hook(note, with_kwargs=True))
    chunks: list[int] = []
    try:
        with torch.no_grad():
            for chunk in in_chunks(model, images):
                chunks.append(len(chunk))
                model(chunk)
    finally:
        for hook in hooks:
            hook.remove()
    result = []
    for name in names:
        ratios = [0.0]
        for parts in zip(*inputs[name], strict=False):  # the kinds of summary are the same ones
            if sum(len(p) for p in parts) == len(labels):
                ratios.append(_between_over_within(torch.cat(parts), labels))
        result.append((name, max(ratios)))
    return result


def _sample(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """At most so many images: all of a class, of every k-th class."""
    classes = labels.unique()
    every = -(-len(labels) // MOST_IMAGES)
    if every <= 1 or len(classes) < 2 * every:
        return images, labels
    rows = torch.isin(labels, classes[::every])
    return images[rows], labels[rows]


def _summaries(module: nn.Module, x: Tensor, images: int) -> list[Tensor]:
    """A layer's input -> float32 [images, D] with D bounded, one or two ways."""
    x = x.float()
    if x.ndim > 2 and x.shape[0] != images and x.shape[1] == images:
        x = x.transpose(0, 1)  # sequence first
    if x.shape[0] != images and x.shape[0] % images == 0:
        x = x.unflatten(0, (images, -1)).flatten(1, -2)  # windows or tokens among the rows
    if isinstance(module, _CONVOLUTIONS):
        if x.ndim == 4:
            return [_pooled(x)]
        return [x.flatten(2).mean(2)] if x.ndim > 2 else [x]
    if x.ndim == 4:  # [N, H, W, C]
        return [_pooled(x.movedim(-1, 1))]
    if x.ndim == 3:
        return [x.mean(1), x[:, 0]]
    return [x.flatten(1)]


def _pooled(x: Tensor) -> Tensor:
    height, width = (min(4, s) for s in x.shape[-2:])
    return nn.functional.adaptive_avg_pool2d(x, (height, width)).flatten(1)


def _between_over_within(features: Tensor, labels: Tensor) -> float:
    classes, index = labels.unique(return_inverse=True)
    count = torch.bincount(index).to(features.dtype)[:, None]
    centred = features - features.mean(0)
    means = torch.zeros(len(classes), features.shape[1], device=features.device)
    means = means.index_add_(0, index, centred) / count
    between = float((count * means.square()).sum())
    within = float((centred - means[index]).square().sum())
    return between / within if within > 0 else 0.0

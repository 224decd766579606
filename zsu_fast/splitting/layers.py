"""A model's layers with weights: their order, and how well each one's input separates the classes.

The latter finds the first responsive layer: the one where class-specific features emerge.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..models.outputs import is_beside_logits, matrices
from ..models.wrapper import LogitsModel
from ..runtime.hooks import forward_hooks, forward_pre_hooks
from ..runtime.inference import Inference

# Bytes of the largest feature map of one chunk.
CHUNK_BYTES = 128 * 1024 * 1024
# The same on a CPU, where maps that leave the cache take up to 1.6 times as long; and the images
# that this leaves at least.
_CACHE_BYTES, _FEWEST_IMAGES = 4 * 1024 * 1024, 16
# Enough to tell layers apart; impressions of 1,000 classes at 224 pixels would take minutes.
MOST_IMAGES = 512
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layer_names(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the modules that own a weight matrix, in the order in which they first run.

    A normalisation layer owns none and belongs to the layer before it. A weight behind a
    parametrization (`torch.nn.utils.parametrizations`) counts as the layer's own. Layers of other
    heads than that of the logits don't count.
    """
    names = {
        module: name
        for name, module in model.named_modules()
        if name
        and ".parametrizations" not in f".{name}"
        and matrices(module)
        and not is_beside_logits(module)
    }
    order: dict[str, None] = {}

    def note(module: nn.Module, _args: Any, _kwargs: Any) -> None:
        order.setdefault(names[module])

    with forward_pre_hooks(names, note), torch.no_grad():
        model(images)
    return list(order)


def in_chunks(model: nn.Module, images: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
    """Yields ``images`` in chunks whose largest feature map takes at most ``chunk_bytes``, or less
    on a CPU.

    The first image is a chunk of its own: the caller runs it, and hooks measure its feature maps.
    """
    largest = images[:1].numel() * images.element_size()

    def measure(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal largest
        for item in output if isinstance(output, tuple | list) else (output,):
            if isinstance(item, Tensor):
                largest = max(largest, item.numel() * item.element_size())

    with forward_hooks(model.modules(), measure):
        yield images[:1]
    others, count = images[1:], max(1, chunk_bytes // largest)
    if images.device.type == "cpu":
        count = min(count, max(_FEWEST_IMAGES, _CACHE_BYTES // largest))
    if len(others):
        yield from others.split(count)


def fisher_ratios(
    model: LogitsModel, images: Tensor, labels: Tensor, most_images: int = MOST_IMAGES
) -> list[tuple[str, float]]:
    """Fisher's ratio at the input of each layer, in the order of the forward pass.

    The ratio is the variance between the class means over the variance within the classes (the
    traces of the two scatter matrices); 0 means no separation, and there is no upper bound.
    Feature maps are first averaged to at most 4 x 4 positions. Of tokens, the mean and the first
    one (the class token, where a model has one) are both tried, and the higher ratio counts.

    Args:
        model: from `working_copy`.
        images, labels: impressions [N, ...] and their classes, int64 [N].
        most_images: of more images than this, only those of evenly spaced classes are used.

    Returns:
        (module name, ratio) of each layer with weights.
    """
    images, labels = _subsample(images, labels, most_images)
    modules = dict(model.module.named_modules())
    names = {modules[name]: name for name in layer_names(model.module, images[:2])}
    summaries: dict[str, list[list[Tensor]]] = {name: [] for name in names.values()}
    chunks: list[int] = []

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        noted = summaries[names[module]]
        if x is not None and len(noted) < len(chunks):  # the layer's first call counts
            noted.append(_summarise(module, x, chunks[-1]))

    inference = Inference(model, images[:1])
    with forward_pre_hooks(names, note):
        for chunk in in_chunks(model, images):
            chunks.append(len(chunk))
            inference(chunk)
    result = []
    for name, noted in summaries.items():
        ratios = [0.0]
        for parts in zip(*noted, strict=False):  # one kind of summary, of all chunks
            if sum(len(p) for p in parts) == len(labels):
                ratios.append(_fisher_ratio(torch.cat(parts), labels))
        result.append((name, max(ratios)))
    return result


def _subsample(images: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """At most ``most`` images: all of a class, of every k-th class."""
    classes = labels.unique()
    every = -(-len(labels) // most)
    if every <= 1 or len(classes) < 2 * every:
        return images, labels
    rows = torch.isin(labels, classes[::every])
    return images[rows], labels[rows]


def _summarise(module: nn.Module, x: Tensor, images: int) -> list[Tensor]:
    """A layer's input -> one or two summaries of it, float32 [images, D] with a bounded D."""
    x = x.float()
    if x.ndim > 2 and x.shape[0] != images and x.shape[1] == images:
        x = x.transpose(0, 1)  # sequence first
    if x.shape[0] != images and x.shape[0] % images == 0:
        x = x.unflatten(0, (images, -1)).flatten(1, -2)  # windows or tokens among the rows
    if isinstance(module, _CONVOLUTIONS):
        if x.ndim == 4:
            return [_pool(x)]
        return [x.flatten(2).mean(2)] if x.ndim > 2 else [x]
    if x.ndim == 4:  # [N, H, W, C]
        return [_pool(x.movedim(-1, 1))]
    if x.ndim == 3:
        return [x.mean(1), x[:, 0]]
    return [x.flatten(1)]


def _pool(x: Tensor) -> Tensor:
    height, width = (min(4, s) for s in x.shape[-2:])
    return nn.functional.adaptive_avg_pool2d(x, (height, width)).flatten(1)


def _fisher_ratio(features: Tensor, labels: Tensor) -> float:
    classes, index = labels.unique(return_inverse=True)
    count = torch.bincount(index).to(features.dtype)[:, None]
    centred = features - features.mean(0)
    means = torch.zeros(len(classes), features.shape[1], device=features.device)
    means = means.index_add_(0, index, centred) / count
    between = float((count * means.square()).sum())
    within = float((centred - means[index]).square().sum())
    return between / within if within > 0 else 0.0

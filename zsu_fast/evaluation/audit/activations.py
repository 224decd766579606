"""One pass over images: what every subject answers, and what its layers see.

Everything the audit measures on images comes from here, so that a data set may be an iterator
that is read once, and each backbone runs once on each image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError
from ...models.input_spec import InputSpec
from .audited_model import AuditedModel

# Layers' inputs are pooled to at most this many numbers an image, the last layer's to the second.
_WIDTH, _LAST_WIDTH = 512, 4096
# Layers that are looked at in a deep model, the last one included.
_MOST_LAYERS = 8


@dataclass
class Activations:
    """What the subjects made of one set of images.

    Attributes:
        labels: int64 [N].
        logits: subject's name -> float32 [N, C].
        answers: subject's name -> int64 [N], also of the subjects whose logits are not kept.
        kept: int64 [M], the images whose features are kept: the first so many of each class.
        features: subject's name -> layer's name -> float32 [M, D], the layer's (pooled) input.
        last: subject's name -> the name of its last layer, a key of ``features``.
        pictured: int64 [K], the images that are kept themselves.
        images: float32 [K, ...].
    """

    labels: Tensor
    logits: dict[str, Tensor]
    answers: dict[str, Tensor]
    kept: Tensor
    features: dict[str, dict[str, Tensor]]
    last: dict[str, str]
    pictured: Tensor
    images: Tensor

    def penultimate(self, name: str) -> Tensor:
        """[M, D]: the input of the subject's last layer."""
        return self.features[name][self.last[name]]


@dataclass
class ActivationCollector:
    """Feeds images to all subjects and collects a `Activations`.

    Args:
        subjects: whose logits and features are kept.
        variants: of whom only the answers are.
        features_per_class: most images of a class whose features are kept.
        images_per_class: class -> most images that are kept themselves.
    """

    subjects: list[AuditedModel]
    variants: list[AuditedModel]
    features_per_class: int
    images_per_class: dict[int, int] = field(default_factory=dict)

    @torch.no_grad()
    def look(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Activations:
        """Runs every subject on (images float [n, ...], labels int64 [n]) batches."""
        groups: dict[str, list[AuditedModel]] = {}
        for subject in [*self.subjects, *self.variants]:
            groups.setdefault(subject.backbone, []).append(subject)
        device = next(self.subjects[0].model.parameters()).device
        wanted = {s.name for s in self.subjects}
        labels: list[Tensor] = []
        logits: dict[str, list[Tensor]] = {name: [] for name in wanted}
        answers: dict[str, list[Tensor]] = {s.name: [] for g in groups.values() for s in g}
        pooled: dict[str, dict[str, list[Tensor]]] = {key: {} for key in groups}
        kept, pictured, images = [], [], []
        total = 0
        feature_count: dict[int, int] = {}
        image_count: dict[int, int] = {}
        for batch, label in batches:
            keep = _first_of_each(label, feature_count, lambda _c: self.features_per_class)
            picture = _first_of_each(label, image_count, lambda c: self.images_per_class.get(c, 0))
            x = batch.to(device)
            for key, group in groups.items():
                needs = any(s.name in wanted for s in group)
                with _inputs_of(group[0], pooled[key] if needs else None, keep, len(label)):
                    crossing = group[0].cut.backbone(x)
                    out = group[0].logits(crossing)
                for subject in group:
                    if subject is not group[0]:
                        out = subject.logits(crossing)
                    answers[subject.name].append(out.argmax(1).cpu())
                    if subject.name in wanted:
                        logits[subject.name].append(out.float().cpu())
            labels.append(label)
            kept.append(total + keep)
            pictured.append(total + picture)
            images.append(batch[picture])
            total += len(label)
        merged = {
            key: {layer: torch.cat(parts) for layer, parts in layers.items()}
            for key, layers in pooled.items()
        }
        owner = {s.name: key for key, group in groups.items() for s in group if s.name in wanted}
        first = {key: group[0] for key, group in groups.items()}
        return Activations(
            torch.cat(labels),
            {name: torch.cat(parts) for name, parts in logits.items()},
            {name: torch.cat(parts) for name, parts in answers.items()},
            torch.cat(kept),
            {name: merged[key] for name, key in owner.items()},
            {name: first[key].layers[-1] for name, key in owner.items()},
            torch.cat(pictured),
            torch.cat(images),
        )


def batches_of(
    data: Any, spec: InputSpec, classes: int, argument: str, batch: int = 250
) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised batches on the CPU from whatever `audit` was given.

    Args:
        data: a (images, labels) pair of tensors, or a DataLoader or other iterable of such pairs;
            images uint8 [N, channels, H, W] (0..255) or float as the model wants them.
        spec: normalises uint8 images.
        classes: number of logits.
        argument: its name, for the error.
        batch: images at a time where ``data`` is a pair of tensors.

    Raises:
        ArgumentError: no images, or labels that the model has no logit for.
    """
    source: Iterable[Any] = data
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        images, labels = data
        if len(images) != len(labels):
            raise ArgumentError(
                argument,
                f"there are {len(images)} images and {len(labels)} labels",
                "Pass a label for each image.",
            )
        source = zip(images.split(batch), labels.split(batch), strict=True)
    elif not isinstance(data, Iterable) or isinstance(data, str | bytes | dict):
        raise ArgumentError(
            argument, f"got a {type(data).__name__}", "Pass (images, labels) or a DataLoader."
        )
    some = False
    for images, labels in source:
        labels = torch.as_tensor(labels).cpu()
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ArgumentError(
                argument,
                f"its labels are {labels.dtype} of shape {tuple(labels.shape)}",
                "Pass one class index, an int, for each image.",
            )
        labels = labels.long()
        if not len(labels):
            continue
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ArgumentError(
                argument,
                f"labels run from {int(labels.min())} to {int(labels.max())}, the model has "
                f"{classes} logits",
                f"Number the classes from 0 to {classes - 1}, as the model was trained.",
            )
        if images.shape[1:] != torch.Size(spec.shape):
            raise ArgumentError(
                argument,
                f"its images are {tuple(images.shape[1:])}, the model takes {spec.shape}",
                "Pass images [N, channels, height, width] of the model's size.",
            )
        some = True
        images = images.cpu()
        yield (spec.normalise(images) if images.dtype == torch.uint8 else images.float()), labels
    if not some:
        raise ArgumentError(
            argument, "there is no image in it", "Pass at least one labelled image."
        )


def looked_at(layers: list[str]) -> list[str]:
    """At most eight of the layers, evenly spaced, the last one among them."""
    if len(layers) <= _MOST_LAYERS:
        return layers
    step = (len(layers) - 1) / (_MOST_LAYERS - 1)
    return [layers[round(i * step)] for i in range(_MOST_LAYERS)]


def summary(x: Tensor, most: int) -> Tensor:
    """[N, ...] -> float32 [N, D], D at most ``most`` where pooling can reach that.

    Maps are averaged to 4 x 4, 2 x 2 or 1 x 1 positions, tokens to their mean.
    """
    x = x.float()
    if x.ndim == 3:
        x = x.mean(1)
    for side in (4, 2, 1):
        if x.ndim != 4 or x[0].numel() <= most:
            break
        size = (min(side, x.shape[-2]), min(side, x.shape[-1]))
        x = nn.functional.adaptive_avg_pool2d(x, size)
    return x.flatten(1)


@contextmanager
def _inputs_of(
    subject: AuditedModel, store: dict[str, list[Tensor]] | None, rows: Tensor, batch: int
) -> Iterator[None]:
    """Collects the pooled input of each looked-at layer, of the batch's ``rows``, in ``store``."""
    if store is None or not len(rows):
        yield
        return
    seen: set[str] = set()
    last = subject.layers[-1]
    hooks = []
    for name in looked_at(subject.layers):

        def note(_module: nn.Module, args: Any, name: str = name) -> None:
            # not where dimension 0 counts something else, as windows or tokens
            if args and isinstance(args[0], Tensor) and name not in seen and len(args[0]) == batch:
                seen.add(name)
                part = args[0][rows.to(args[0].device)]
                store.setdefault(name, []).append(
                    summary(part, _LAST_WIDTH if name == last else _WIDTH).cpu()
                )

        hooks.append(subject.model.module.get_submodule(name).register_forward_pre_hook(note))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _first_of_each(labels: Tensor, count: dict[int, int], most: Any) -> Tensor:
    """int64: places in ``labels`` of those within the first ``most(class)`` of their class."""
    places = []
    for at, c in enumerate(labels.tolist()):
        number = count.get(c, 0)
        if number < most(c):
            count[c] = number + 1
            places.append(at)
    return torch.tensor(places, dtype=torch.int64)

"""Where deep forgetting splits the model: which layers it trains, and where rows are inverted."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ArgumentError, ModelError, ZsuFastError, shorten
from ...models.embedding_classifier import GALLERY, EmbeddingClassifier
from ...models.input_spec import InputSpec, noise_images
from ...models.wrapper import LogitsModel
from ...runtime import memory
from ...runtime.hooks import forward_pre_hooks, recorded_inputs
from ...splitting.batch_dim import BoundaryTensors
from ...splitting.class_rows import expose_class_buffers
from ...splitting.classifier import class_split, classifier_split
from ...splitting.layers import layer_names
from ...splitting.split import Split, resplit, split_at, split_before
from ...synthesis.space import FlatTail, flatten_boundary
from .settings import layer_norms_alone

# Few rows determine few weights: more layers cost retained accuracy. A block of a transformer is
# four layers, and it forgets more of what a probe reads if its queries and keys are trained, too.
_MOST_LAYERS, _OF_A_BLOCK, _MOST_SHARE, _MOST_WEIGHTS = 3, 4, 0.3, 100_000
_AHEAD = 4  # rows are inverted at most this many layers ahead of the trained ones
_LARGE, _REDUCED = 160, 128  # images of a larger side than the first are drawn at the second


class OnlyLastLayer(ArgumentError):
    """Nothing but the last layer follows the module that was named."""


@dataclass
class DeepSplit:
    """A model in three parts: ``split.tail(*middle(early.backbone(x))) == model(x)``.

    Attributes:
        split: ahead of the first trained layer: rows are stored and trained there.
        early: some layers ahead of that: rows are inverted there.
        flat: the early tail, for flattened boundary tensors [N, D].
        middle: flattened early boundary tensors -> boundary tensors of ``split``; None if that is
            the early split itself.
        last: ahead of the last layer.
        parameters: names of what is trained beside the last layer.
        shape: of the images that the rows are drawn as: the model's, or smaller ones.
    """

    split: Split
    early: Split
    flat: FlatTail
    middle: nn.Module | None
    last: Split
    parameters: list[str]
    shape: tuple[int, ...]

    def features(self, points: Tensor) -> BoundaryTensors:
        """Flattened early boundary tensors [N, D] -> boundary tensors of ``split``."""
        return self.flat.split(points) if self.middle is None else tuple(self.middle(points))

    def image_features(self, images: Tensor) -> BoundaryTensors:
        """Images [N, ...] of any resolution -> boundary tensors of ``split``, without gradients."""
        if images.shape[1:] != self.shape:
            images = F.interpolate(images, self.shape[1:], mode="bilinear", antialias=True)
        early = self.early.features(images)
        with torch.no_grad():
            flat = flatten_boundary(early)
            parts = [self.features(points) for points in flat.split(memory.chunk_of(flat))]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    @torch.no_grad()
    def last_features(self, model: LogitsModel, points: Tensor, images: bool) -> Tensor:
        """What the last layer of ``model`` takes: early points [N, D], or images -> [N, ...]."""
        with recorded_inputs(model.module.get_submodule(self.last.name)) as inputs:
            for part in points.split(memory.chunk_of(points)):
                model(part) if images else self.flat(part)
        return torch.cat(inputs)


def find_deep_split(model: LogitsModel, at: str | int, spec: InputSpec) -> DeepSplit:
    """Splits ``model`` ahead of the layers to train, and some layers earlier.

    "auto" trains at most three layers ahead of the last one, four in a model with layer norms and
    no batch norms: at most three in ten of them, with at most 100,000 weights together, but at
    least one, and with a layer those that take the same input (the branches of a Fire module).
    Rows are inverted one to four layers earlier, where the boundary is a single tensor if possible,
    and smallest. Large images are drawn at 128 pixels if the model runs on them.

    Args:
        model: from `working_copy`.
        at: "auto", a number of layers with the last one, or the first module to train.
        spec: the model's images.

    Raises:
        ArgumentError: nothing but the last layer would be trained (`OnlyLastLayer` if the caller
            named it).
        ModelError: there is another way to the logits than the last layer.
    """
    device = next(model.parameters()).device
    images = noise_images(spec, 4).to(device)
    images = _reduced(model, images)
    names, last = _last_layer(model, images)
    _check_features(model, last, names[-1], images[:2])
    first, reason = _first_trained(model, at, names, images)
    whole = split_at(model, first, images[:2], reason)
    classifier = {*last.parameters, *last.fixed}
    parameters = [name for name in whole.parameters if name not in classifier]
    if not parameters and (frozen := set(whole.fixed) - classifier):
        raise ModelError(
            f"the layers ahead of its last one are frozen (requires_grad=False): {shorten(frozen)}",
            "Unfreeze them, model.requires_grad_(True), or pass depth='output'.",
        )
    if not parameters:
        raise OnlyLastLayer(
            "tail",
            f"got {at!r} with depth='deep', and only the last layer follows it",
            f"Name an earlier module, such as {names[max(0, len(names) - 2)]!r}, leave it out, or "
            f"pass depth='output'.",
        )
    early = _early_split(model, first, names, images) or whole
    with torch.no_grad():
        boundary = early.backbone(images)
    flat = FlatTail(early.tail, boundary)
    split, middle = whole, None
    if early is not whole:
        try:
            middle, tail = resplit(model, flat, first, flatten_boundary(boundary))
            with torch.no_grad():
                ends = middle(flatten_boundary(boundary)), whole.backbone(images)
            if not _same_boundary(*ends):
                split = replace(whole, tail=tail)
        except ZsuFastError:  # the rows are stored at the early split then
            split = replace(early, parameters=whole.parameters, reason=reason)
    if isinstance(model.module, EmbeddingClassifier):
        split.output_level = False  # a single layer of the encoder is no classifier
    return DeepSplit(split, early, flat, middle, last, parameters, tuple(images.shape[1:]))


@torch.no_grad()
def _check_features(model: LogitsModel, last: Split, name: str, images: Tensor) -> None:
    """Raises ModelError unless the tail behind the last layer, ``name``, takes what it takes."""
    taken = last.backbone(images)
    if len(taken) != 1:
        raise ModelError(
            f"its last layer {name!r} is not the only way from the features to the logits",
            "Pass depth='output'.",
        )
    with recorded_inputs(model.module.get_submodule(last.name)) as inputs:
        model(images)
    if not _same_boundary(tuple(inputs), taken):
        raise ModelError(
            f"what its last layer {name!r} takes is no module's output, and torch.fx can't "
            f"trace its forward pass",
            "Pass depth='output'.",
        )


def _same_boundary(got: BoundaryTensors, want: BoundaryTensors) -> bool:
    """Whether two ways to a split end in the same tensors: either tail then takes both. That of a
    second split replays modules, and computes again what lies between them.
    """

    def same(a: Tensor, b: Tensor) -> bool:
        rounding = max(1e-3, *(2 * torch.finfo(x.dtype).eps for x in (a, b)))  # half precision
        a, b = a.float(), b.float()
        size = (
            b.nan_to_num(0.0, 0.0, 0.0).abs().max()
        )  # an infinite tolerance would accept anything
        tolerance = rounding / 10 * (1 + float(size))
        return a.shape == b.shape and torch.allclose(a, b, rtol=rounding, atol=tolerance)

    return len(got) == len(want) and all(map(same, got, want))


def _last_layer(model: LogitsModel, images: Tensor) -> tuple[list[str], Split]:
    """The names of all layers with weights, and the split ahead of the last one: the classifier, or
    the templates of an `EmbeddingClassifier`.
    """
    if isinstance(model.module, EmbeddingClassifier):
        names = [*layer_names(model.module, images), GALLERY]
        return names, split_before(model, GALLERY, images[:2], "the templates")
    expose_class_buffers(model, images)
    names = layer_names(model.module, images)
    last = split_at(model, names[-1], images[:2], "the last layer")
    last = class_split(model, last, images[:2])
    last.directions = classifier_split(model, last, images).directions
    return names, last


def _first_trained(
    model: LogitsModel, at: str | int, names: Sequence[str], images: Tensor
) -> tuple[str, str]:
    """The module at which the trained part starts, and why."""
    ahead = len(names) - 1
    if ahead == 0:
        raise ArgumentError(
            "depth",
            "got 'deep', and the model has a single layer with weights: no features",
            "Pass depth='output'.",
        )
    if at in ("last", 1):
        raise ArgumentError(
            "tail",
            f"got {at!r} with depth='deep', and only the last layer follows it",
            "Leave tail out, or pass depth='output'.",
        )
    if isinstance(at, str) and at != "auto":
        return at, "named by the caller"
    if isinstance(at, int):
        if not 2 <= at <= len(names):
            raise ArgumentError(
                "tail",
                f"got {at!r} with depth='deep'",
                f"Pass a number of layers from 2 to {len(names)}: the last one counts too.",
            )
        return names[-at], f"the last {at} layers"
    modules = dict(model.module.named_modules())
    most = _OF_A_BLOCK if layer_norms_alone(model.module) else _MOST_LAYERS
    most, weights, count = min(most, -int(-_MOST_SHARE * ahead // 1)), 0, 0
    for name in reversed(names[:-1]):
        weights += sum(p.numel() for p in modules[name].parameters() if p.ndim > 1)
        if count and (count == most or weights > _MOST_WEIGHTS):
            break
        count += 1
    inputs = _layer_inputs(model, [modules[n] for n in names[:-1]], images)
    start = ahead - count
    while start and inputs[start - 1] == inputs[start]:
        start -= 1
    return names[start], f"deep: the {ahead - start} layers ahead of the last one, of {ahead}"


def _layer_inputs(model: LogitsModel, layers: Sequence[nn.Module], images: Tensor) -> list[Any]:
    """What identifies the input of each layer; the same for layers that take the same tensor."""
    inputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: Any, _kwargs: Any) -> None:
        if args and isinstance(args[0], Tensor):
            inputs.setdefault(module, args[0])  # held, so that no other tensor gets its id

    with forward_pre_hooks(layers, note), torch.no_grad():
        model(images[:2])
    return [id(inputs.get(layer, layer)) for layer in layers]


def _early_split(
    model: LogitsModel, first: str, names: Sequence[str], images: Tensor
) -> Split | None:
    """The split at which rows are inverted; None if there is none ahead of ``first``."""
    inside = [i for i, name in enumerate(names) if name == first or name.startswith(f"{first}.")]
    best: tuple[bool, int] | None = None
    found = None
    for name in _modules_ahead(names, inside[0] if inside else 0):
        try:
            candidate = split_at(model, name, images[:2], "rows are inverted here")
        except ZsuFastError:
            continue
        with torch.no_grad():
            boundary = candidate.backbone(images[:2])
        cost = len(boundary) > 1, sum(t[0].numel() for t in boundary)
        if all(t.is_floating_point() for t in boundary) and (best is None or cost < best):
            best, found = cost, candidate
    return found


def _modules_ahead(names: Sequence[str], start: int) -> Iterator[str]:
    """For each of the layers ahead of ``start``, the largest module that begins with it."""
    for place in range(start - 1, max(-1, start - 1 - _AHEAD), -1):
        parts = names[place].split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            inside = [i for i, n in enumerate(names) if n == prefix or n.startswith(f"{prefix}.")]
            if inside[0] == place and start not in inside:
                yield prefix
                break


def _reduced(model: LogitsModel, images: Tensor) -> Tensor:
    """``images`` at 128 pixels if they are large and the model runs on such ones, else as given.

    A model whose adaptive pooling would have to enlarge its maps keeps the full size. A copy is
    tried: some, such as transformers' Swin, adapt to small images for good.
    """
    if images.ndim != 4 or min(images.shape[2:]) <= _LARGE:
        return images
    model = copy.deepcopy(model)
    factor = _REDUCED / min(images.shape[2:])
    size = [32 * max(1, round(side * factor / 32)) for side in images.shape[2:]]
    enlarged = False

    def note(pool: nn.Module, args: Any, _kwargs: Any) -> None:
        nonlocal enlarged
        size: Any = pool.output_size
        wanted = size if isinstance(size, tuple) else (size, size)
        sides = zip(wanted, args[0].shape[-2:], strict=True)
        enlarged |= any(want is not None and want > side for want, side in sides)

    kinds = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
    small = F.interpolate(images, size, mode="bilinear", antialias=True)
    try:
        with (
            forward_pre_hooks([m for m in model.modules() if isinstance(m, kinds)], note),
            torch.no_grad(),
        ):
            same = model(small).shape == model(images).shape
    except (RuntimeError, ValueError, AssertionError, TypeError):
        return images
    return small if same and not enlarged else images

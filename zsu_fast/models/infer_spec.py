"""Finds the `InputSpec` of a model: given, stated by the model, or inferred from its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import ArgumentError, ModelError
from ..runtime.hooks import forward_hooks
from .embedding_classifier import EmbeddingClassifier
from .input_spec import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    InputSpec,
    runs_on,
    stated_shape,
    stated_spec,
)  # fmt: skip
from .kinds import CHANNELS_LAST, check_forward, check_kind
from .parameters import UNCOPYABLE, deep_copy, unwrap
from .wrapper import pick_logits

# Largest normalised pixel; its square is still finite.
_LARGEST_PIXEL = 1e6
# Image sizes that classifiers are trained at, the most common first; see `infer_shape`.
_COMMON_SIZES = (32, 224, 28, 64, 96, 128, 160, 192, 240, 256, 288, 299, 384, 48, 16, 8)


def resolve_spec(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> InputSpec:
    """Returns what images the model expects, without data.

    Given values come first, then what the model states (`stated_spec`). Otherwise the shape is
    inferred from the layers (`infer_shape`), and ``assumed`` is set: mean and std are those of
    ImageNet for three channels, of MNIST for one, and 0.5 for other numbers.

    Raises:
        ArgumentError: a given value is malformed, or the shape can't be inferred.
    """
    inner = unwrap(model)
    check_kind(inner)
    check_forward(inner)
    all_given = input_shape is not None and mean is not None and std is not None
    stating = unwrap(inner.encoder) if isinstance(inner, EmbeddingClassifier) else inner
    stated = _stated(stating, all_given)
    if input_shape is not None:
        shape, source = _check_shape(input_shape), "shape given"
        _check_channels_first(inner, shape)
    elif stated is not None:
        shape, source = stated.shape, stated.source
    else:
        shape, source = stated_shape(stating) or infer_shape(inner)
    channels = shape[0]
    if mean is None and std is None and stated is not None and len(stated.mean) == channels:
        resize = stated.resize if shape == stated.shape else None
        return replace(stated, shape=shape, source=source, resize=resize)
    if mean is None and std is None:
        guess_mean, guess_std, guess = _guess_normalisation(channels)
        return InputSpec(shape, guess_mean, guess_std, f"{source}; {guess}", assumed=True)
    means = _check_channels("mean", 0.0 if mean is None else mean, channels)
    stds = _check_channels("std", 1.0 if std is None else std, channels)
    if any(s <= 0 for s in stds):
        raise ArgumentError("std", f"got {std!r}", "Pass values above 0.")
    bgr = stated is not None and stated.bgr
    spec = InputSpec(shape, means, stds, f"{source}; mean and std given", bgr=bgr)
    if float(torch.cat([spec.low, spec.high]).abs().max()) > _LARGEST_PIXEL:
        raise ArgumentError(
            "std" if max(map(abs, means)) <= _LARGEST_PIXEL else "mean",
            f"pixels would exceed {_LARGEST_PIXEL:.0e} with mean {mean!r} and std {std!r}",
            "Pass the mean and std of pixels in 0..1.",
        )
    return spec


def _stated(model: nn.Module, all_given: bool) -> InputSpec | None:
    """What the model states, adapted to its layers; an error in it counts only if it is needed."""
    try:
        stated = stated_spec(model)
    except ArgumentError:
        if all_given:
            return None
        raise
    return stated if stated is None or all_given else _adapted(model, stated)


def _adapted(model: nn.Module, stated: InputSpec) -> InputSpec:
    """``stated``, with the channels and the size of the model's own layers where those differ.

    timm's ``in_chans`` and ``img_size`` change the layers, not the ``pretrained_cfg``.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = stated.shape[0] if first is None else first.in_channels
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    sides = tuple(size) if isinstance(size, tuple | list) else stated.shape[1:]
    layers_shape = (channels, *sides)
    if len(stated.shape) != 3 or layers_shape == stated.shape or runs_on(model, stated.shape):
        return stated
    for shape in (layers_shape, (channels, *stated.shape[1:])):
        if not runs_on(model, shape):
            continue
        resize = stated.resize if shape[1:] == stated.shape[1:] else None
        source = f"{stated.source}; shape {shape} by its layers"
        if channels == stated.shape[0]:
            return replace(stated, shape=shape, source=source, resize=resize)
        mean, std = (sum(v) / len(v) for v in (stated.mean, stated.std))
        source += f", mean and std averaged for {channels} channels"
        return InputSpec(
            shape, (mean,) * channels, (std,) * channels, source, resize, stated.interpolation,
            assumed=True,
        )  # fmt: skip
    return stated


def _check_channels_first(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuses (height, width, channels) as a shape."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if len(shape) != 3 or shape[2] > 4 or shape[0] <= 4:
        return
    if first is not None and first.in_channels != shape[0]:
        raise ArgumentError(
            "input_shape",
            f"got {shape}, which looks like (height, width, channels)",
            f"Pass (channels, height, width). If the model itself takes channels last: "
            f"{CHANNELS_LAST}",
        )


def infer_shape(model: nn.Module) -> tuple[tuple[int, ...], str]:
    """Infers the shape of the images from the layers alone; returns it and its source.

    The number of channels is that of the first convolution, or follows from the width of the first
    linear layer. Of the common sizes, those remain at which the model runs. If there are several,
    as with global pooling, takes the first of at least 28 pixels at which the last feature map is
    4 to 16 wide, as is usual: 8 for a ResNet for 32 pixels, 7 for one for 224.

    Raises:
        ArgumentError: the model runs at no common size, or at several without such a map.
    """
    check_kind(model)
    probe = deep_copy(model, UNCOPYABLE, hooks=False)
    probe.float()  # not chained: some models' methods return None
    probe.eval()
    first = next((m for m in probe.modules() if isinstance(m, nn.Conv2d | nn.Linear)), None)
    if first is None:
        raise ArgumentError(
            "input_shape",
            "not given, and the model has no convolution or linear layer to infer it from",
            "Pass input_shape=(channels, height, width).",
        )
    any_width = isinstance(first, nn.Linear)  # a perceptron has no feature maps
    candidates = _candidate_shapes(first)
    running: list[tuple[int, ...]] = []
    error: Exception | None = None
    # a single image if two fail at every size: `count_classes` then reports what is wrong
    for batch in (2, 1):
        for shape in candidates:
            try:
                width = _last_map_width(probe, shape, batch)
            except Exception as raised:  # noqa: BLE001  this size does not fit, the next may
                error = raised
                continue
            if any_width or (4 <= width <= 16 and shape[-1] >= 28):
                return shape, f"shape inferred: the last feature map is {width} wide"
            running.append(shape)
        if running:
            break
    if len(running) == 1:
        return running[0], "shape inferred: the only common one at which the model runs"
    for channels, height, width in (c for c in candidates if len(c) == 3):
        if not running and runs_on(model, (height, width, channels)):
            raise ModelError("it takes images with their channels last", CHANNELS_LAST) from error
    if isinstance(error, ModelError) and not running:  # an encoder that returns no embeddings
        raise error
    raise _cannot_infer(running, len(candidates), error) from error


def _candidate_shapes(first: nn.Conv2d | nn.Linear) -> list[tuple[int, ...]]:
    """Common shapes of images that the first layer accepts."""
    if isinstance(first, nn.Conv2d):
        return [(first.in_channels, side, side) for side in _COMMON_SIZES]
    shapes: list[tuple[int, ...]] = []
    for channels in (1, 3):
        side = math.isqrt(first.in_features // channels)
        if channels * side * side == first.in_features:
            shapes.append((channels, side, side))
    return [*shapes, (first.in_features,)]


def _cannot_infer(
    running: list[tuple[int, ...]], tried: int, error: Exception | None
) -> ArgumentError:
    if running:
        sides = ", ".join(str(shape[-1]) for shape in running)
        return ArgumentError(
            "input_shape",
            f"not given; the model runs on images of {sides} pixels, and it is unknown which size "
            f"it was trained on",
            "Pass input_shape=(channels, height, width), and mean and std.",
        )
    return ArgumentError(
        "input_shape",
        f"not given, and the model raises at each of {tried} common shapes, "
        f"at the last with {type(error).__name__}: {error}",
        "Pass input_shape=(channels, height, width).",
    )


@torch.no_grad()
def _last_map_width(model: nn.Module, shape: Sequence[int], batch: int) -> int:
    """Width of the last feature map; 0 if there is none.

    A feature map is the output [N, C, W, W] of a convolution or [N, W, W, C] of a linear layer.
    """
    width = 0

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal width
        if not isinstance(output, Tensor) or output.ndim != 4:
            return
        if isinstance(module, nn.Conv2d):
            width = int(output.shape[-1])
        elif output.shape[1] == output.shape[2]:
            width = int(output.shape[1])

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with forward_hooks(layers, note):
        output = model(torch.zeros(batch, *shape, device=device))
    leaves = (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.ndim)
    first = next(leaves, None)
    rows = len(pick_logits(output) if first is None else first)
    if rows != batch:  # x.view(-1, 400) of a larger map moves pixels into the batch
        raise ValueError(f"{rows} rows of output for {batch} images")
    return width


def _guess_normalisation(channels: int) -> tuple[tuple[float, ...], tuple[float, ...], str]:
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD, "ImageNet mean and std assumed"
    if channels == 1:
        return (0.1307,), (0.3081,), "MNIST mean and std assumed"
    return (0.5,) * channels, (0.5,) * channels, "mean and std of 0.5 assumed"


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    try:
        result = tuple(int(n) for n in shape)
        whole = all(int(n) == n and not isinstance(n, bool) for n in shape)
    except (TypeError, ValueError):
        result, whole = (), False
    if not whole or len(result) not in (1, 3) or min(result, default=0) < 1:
        raise ArgumentError(
            "input_shape", f"got {shape!r}", "Pass (channels, height, width), each at least 1."
        )
    return result


def _check_channels(name: str, value: float | Sequence[float], channels: int) -> tuple[float, ...]:
    try:
        several = (value,) * channels if isinstance(value, int | float) else value
        values = tuple(float(v) for v in several)
    except (TypeError, ValueError):
        values = ()
    if len(values) != channels or not all(math.isfinite(v) for v in values):
        raise ArgumentError(
            name,
            f"got {value!r} for images of {channels} channels",
            f"Pass one number, or {channels} of them.",
        )
    return values

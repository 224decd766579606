"""Where impressions lie: valid images, or boundary tensors at the split (`space="tail-input"`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.input_spec import InputSpec, noise_images
from ..models.wrapper import LogitsModel
from ..runtime import memory
from ..runtime.torch_settings import Precision
from ..splitting.batch_dim import BoundaryTensors
from ..splitting.split import Split
from .inference_copy import InferenceCopy, inference_copy

SpaceName = Literal["input", "tail-input"]
SPACES = ("input", "tail-input")
# Standard deviation of the starting points, in units of `SearchSpace.step`.
_NOISE = 0.1
# Noise images whose activations give the scale of the space at the split.
_NOISE_IMAGES = 32


@dataclass(frozen=True)
class SearchSpace:
    """The space of an ascent: which values are valid, where it starts, how long a step is.

    Attributes:
        name: "input" or "tail-input".
        spec: shape and normalisation of the model's images.
        split_name: the module at the split; "" in the input space.
        shape: of one point.
        low, high: bounds, broadcastable to [N, *shape]; infinite where there is none.
        init_mean, init_std: of the normal starting points, broadcastable to [N, *shape].
        step: the distance that a step size of 1 stands for, scalar.
        fast_model: points [N, *shape] -> logits [N, C], as cheap as possible.
        exact: the same function, by the float32 model itself.
        regulariser: a scalar of the last batch that ``fast_model`` ran; it is minimised besides,
            with the weight `AscentSettings.batch_norm`. None for none.
    """

    name: str
    spec: InputSpec
    split_name: str
    shape: tuple[int, ...]
    low: Tensor
    high: Tensor
    init_mean: Tensor
    init_std: Tensor
    step: Tensor
    fast_model: InferenceCopy
    exact: nn.Module
    regulariser: Callable[[], Tensor] | None = None

    def parts(self, points: Tensor) -> BoundaryTensors:
        """Points [N, D] of the space "tail-input" -> the boundary tensors that they stand for.

        Raises:
            ArgumentError: they were synthesised at another split.
        """
        assert isinstance(self.exact, FlatTail)
        return self.exact.split(points)

    def start(self, noise: Tensor) -> Tensor:
        """Standard normal noise [N, *shape] -> starting points."""
        return torch.clamp(self.init_mean + self.init_std * noise, self.low, self.high)

    def one_point(self) -> Tensor:
        """The starting point without noise, [1, *shape], to measure or count with."""
        return self.start(torch.zeros(1, *self.shape, device=self.low.device))

    def bytes_per_row(self) -> int:
        """Memory of one row of a step, see `memory.bytes_per_row`."""
        block = self.fast_model.block
        rows = self.one_point().expand(block, *self.shape)
        return -(-memory.bytes_per_row(self.fast_model, rows) // block)


def input_space(model: LogitsModel, spec: InputSpec, precision: Precision) -> SearchSpace:
    """Valid images. They start from mid-grey with a little noise, and steps are in units of the
    mean range of valid values.
    """
    device = next(model.parameters()).device
    per_channel = (-1, 1, 1) if len(spec.shape) == 3 else (-1,)
    low, high = (b.view(per_channel).to(device) for b in (spec.low, spec.high))
    probe = noise_images(spec, 2).to(device)
    span = high - low
    return SearchSpace(
        name="input",
        spec=spec,
        split_name="",
        shape=spec.shape,
        low=low,
        high=high,
        init_mean=(low + high) / 2,
        init_std=_NOISE * span,
        step=span.mean(),
        fast_model=inference_copy(model, probe, precision),
        exact=model,
    )


def tail_input_space(split: Split, spec: InputSpec, device: torch.device) -> SearchSpace:
    """Boundary tensors at the split, flattened: only the tail runs, never the backbone.

    Their scale comes from the activations of a few noise images; if none of these is negative
    (after a ReLU), no point is. They start near zero: started from those activations, which stand
    for a class of their own, LeNet5 on MNIST kept FA 39 (on training images; from zero: 0).
    """
    features = split.features(noise_images(spec, _NOISE_IMAGES).to(device))
    flat, tail = flatten_boundary(features), FlatTail(split.tail, features)
    size = flat.square().mean().sqrt()
    infinity = torch.tensor(math.inf, device=device)
    return SearchSpace(
        name="tail-input",
        spec=spec,
        split_name=split.name,
        shape=(flat.shape[1],),
        low=torch.zeros((), device=device) if bool((flat >= 0).all()) else -infinity,
        high=infinity,
        init_mean=torch.zeros_like(size),
        init_std=_NOISE * size,
        step=size,
        fast_model=InferenceCopy(tail, False, torch.float32, False),
        exact=tail,
    )


def flatten_boundary(boundary: BoundaryTensors) -> Tensor:
    """Boundary tensors, each [N, ...] -> one vector per row, [N, D]; `FlatTail.split` undoes it."""
    return torch.cat([t.flatten(1) for t in boundary], 1)


class FlatTail(nn.Module):
    """A tail that takes one vector per row, as `flatten_boundary` gives it.

    Args:
        tail: the tail.
        boundary: some boundary tensors, for their shapes.
    """

    def __init__(self, tail: nn.Module, boundary: BoundaryTensors) -> None:
        super().__init__()
        self.tail, self.unflatten = tail, _Unflatten([tuple(t.shape[1:]) for t in boundary])
        self.shapes, self.sizes = self.unflatten.shapes, self.unflatten.sizes

    def split(self, points: Tensor) -> BoundaryTensors:
        """Points [N, D] -> boundary tensors."""
        return self.unflatten.forward(points)

    def forward(self, points: Tensor) -> Tensor:
        parts = self.unflatten(points)
        # by number: a graph, as torch.fx traces it, has no length to iterate over
        logits: Tensor = self.tail(*[parts[i] for i in range(len(self.shapes))])
        return logits


class _Unflatten(nn.Module):
    """Points [N, D] -> boundary tensors; a module of its own, which torch.fx need not trace."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.sizes = shapes, [math.prod(shape) for shape in shapes]

    def forward(self, points: Tensor) -> BoundaryTensors:
        if points.shape[1] != sum(self.sizes):
            raise ArgumentError(
                "impressions",
                f"got points of {points.shape[1]} values for boundary tensors of {sum(self.sizes)}",
                "Pass impressions that were synthesised at the same tail=.",
            )
        parts = points.split(self.sizes, 1)
        return tuple(p.reshape(-1, *s) for p, s in zip(parts, self.shapes, strict=True))

"""Where impressions live: valid images, or activations at the cut (`space="tail-input"`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.input_spec import InputSpec, noise_images
from ..models.wrapper import LogitsModel
from ..runtime.precision import Precision
from ..splitting.split import Split
from .inference_copy import InferenceCopy, inference_copy

SpaceName = Literal["input", "tail-input"]
SPACES = ("input", "tail-input")
# The starting points' deviation, in steps of size 1.
_NOISE = 0.1
# Noise images whose activations give the scale of the space at the cut.
_NOISE_IMAGES = 32


@dataclass(frozen=True)
class SearchSpace:
    """A space to climb in: which values are valid, where to start, how long a step is.

    Attributes:
        name: "input" or "tail-input".
        cut: the name of the module at the cut; "" in the input space.
        shape: of one point.
        low, high: bounds, broadcastable to [N, *shape]; infinite where there is none.
        middle, spread: mean and standard deviation of the starting points, broadcastable too.
        step: what a step size of 1 stands for.
        fast_model: points [N, *shape] -> logits, as cheaply as they can be had.
        exact: the same, by the float32 model itself.
    """

    name: str
    cut: str
    shape: tuple[int, ...]
    low: Tensor
    high: Tensor
    middle: Tensor
    spread: Tensor
    step: Tensor
    fast_model: InferenceCopy
    exact: nn.Module

    def parts(self, points: Tensor) -> tuple[Tensor, ...]:
        """Points of the space "tail-input" [N, D] -> the tensors that cross the cut."""
        assert isinstance(self.exact, FlatTail)
        return self.exact.split(points)

    def start(self, noise: Tensor) -> Tensor:
        """Standard normal noise [N, *shape] -> starting points."""
        return torch.clamp(self.middle + self.spread * noise, self.low, self.high)


def input_space(model: LogitsModel, spec: InputSpec, precision: Precision) -> SearchSpace:
    """Valid images: mid-grey with a little noise to start from, a step in units of the range."""
    device = next(model.parameters()).device
    bounds = (-1, 1, 1) if len(spec.shape) == 3 else (-1,)
    low, high = (b.view(bounds).to(device) for b in (spec.low, spec.high))
    probe = noise_images(spec, 2).to(device)
    middle, span = (low + high) / 2, high - low
    fast = inference_copy(model, probe, precision)
    return SearchSpace(
        "input", "", spec.shape, low, high, middle, _NOISE * span, span.mean(), fast, model
    )


def tail_input_space(cut: Split, spec: InputSpec, device: torch.device) -> SearchSpace:
    """Activations at the cut, flattened: the head is not run for them, only the tail is.

    Their scale comes from the activations of a few noise images; where none of these is negative
    (after a ReLU), none becomes so. They start near zero: from those activations themselves, which
    mean a class of their own, LeNet5 on MNIST kept FA 39 (on training images; from zero: 0).
    """
    features = cut.features(noise_images(spec, _NOISE_IMAGES).to(device))
    flat = torch.cat([f.flatten(1) for f in features], 1)
    tail = FlatTail(cut.tail, [tuple(f.shape[1:]) for f in features])
    size = flat.square().mean().sqrt()
    nothing = torch.tensor(math.inf, device=device)
    return SearchSpace(
        "tail-input", cut.name, (flat.shape[1],),
        torch.zeros((), device=device) if bool((flat >= 0).all()) else -nothing,
        nothing, torch.zeros_like(size), _NOISE * size, size,
        InferenceCopy(tail, False, torch.float32, False), tail,
    )  # fmt: skip


class FlatTail(nn.Module):
    """A tail fed with one vector a row: what crosses the cut, flattened and joined."""

    def __init__(self, tail: nn.Module, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.tail, self.shapes = tail, shapes
        self.sizes = [math.prod(shape) for shape in shapes]

    def split(self, points: Tensor) -> tuple[Tensor, ...]:
        """Points [N, D] -> the tensors that cross the cut."""
        if points.shape[1] != sum(self.sizes):
            raise ArgumentError(
                "impressions",
                f"got points of {points.shape[1]} values, and {sum(self.sizes)} cross the cut",
                "Give some that were made at the same tail=.",
            )
        parts = points.split(self.sizes, 1)
        return tuple(p.reshape(-1, *s) for p, s in zip(parts, self.shapes, strict=True))

    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = self.tail(*self.split(points))
        return logits

"""Brings labelled images into the form that a model takes, and says what it assumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..models.input_spec import InputSpec


@dataclass
class ImageFormat:
    """Turns batches of images into what the model takes, and notes what it assumes.

    Args:
        spec: the images that the model takes; None if that is unknown.
        argument: the name of the data's argument, for errors and warnings.
        exact_size: whether images of another height or width are refused.
    """

    spec: InputSpec | None
    argument: str = "data"
    exact_size: bool = False
    _facts: dict[str, None] = field(default_factory=dict)
    _doubts: dict[str, None] = field(default_factory=dict)
    _lowest: float = float("inf")
    _highest: float = float("-inf")

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 or float [N, ...] -> normalised float32, or float images as they are.

        Images [N, H, W, C], and grey ones [N, H, W], become [N, C, H, W] if the model takes those.

        Raises:
            ArgumentError: another dtype; uint8 without a known mean and std; or another size.
        """
        images = self._layout(images)
        if images.dtype == torch.uint8:
            if self.spec is None:
                raise ArgumentError(
                    self.argument,
                    "its images are uint8, and the model does not state its mean and std",
                    "Pass mean and std of pixels in 0..1, or images normalised as in the model's "
                    "training.",
                )
            text = (
                f"images are uint8: they are normalised with mean {_show(self.spec.mean)} and std "
                f"{_show(self.spec.std)}, {self.spec.source}"
            )
            if self.spec.assumed:
                self._doubts[f"{text}, which is a guess: pass mean and std"] = None
            else:
                self._facts[text] = None
            return self.spec.normalise(images)
        if not images.is_floating_point():
            raise ArgumentError(
                self.argument, f"its images are {images.dtype}", "Pass uint8 or float images."
            )
        if len(images):
            self._lowest = min(self._lowest, float(images.min()))
            self._highest = max(self._highest, float(images.max()))
        return images

    def read(self, picture: Any) -> Tensor:
        """Pillow image -> normalised float32 [C, H, W]."""
        if self.spec is None:
            raise ArgumentError(
                self.argument,
                "its images are pictures, and the model does not state what it takes",
                "Pass input_shape, mean and std, or tensors as the model takes them.",
            )
        if self.spec.assumed:
            self._doubts[f"mean and std are a guess ({self.spec.source}): pass mean and std"] = None
        return self.spec.transform()(picture)

    def assumptions(self) -> tuple[list[str], list[str]]:
        """What was assumed of all batches so far: what the model or the data state, and doubts."""
        spec = self.spec
        if spec is not None and not spec.assumed and float(spec.low.max()) < 0:
            unit = 0 <= self._lowest <= 0.1 and 0.9 <= self._highest <= 1
            byte = self._lowest >= 0 and 128 <= self._highest <= 256
            if unit or (byte and self._highest > 2 * float(spec.high.max())):
                text = (
                    f"float images are run as they are, and theirs lie in {self._lowest:.3g} to "
                    f"{self._highest:.3g}, as if they were not normalised; the model takes mean "
                    f"{_show(spec.mean)} and std {_show(spec.std)} ({spec.source})"
                )
                self._doubts[text] = None
        facts, doubts = ([f"{self.argument}: {n}" for n in d] for d in (self._facts, self._doubts))
        return facts, doubts

    def _layout(self, images: Tensor) -> Tensor:
        spec = self.spec
        if spec is None or len(spec.shape) != 3 or images.shape[1:] == torch.Size(spec.shape):
            return images
        channels, *size = spec.shape
        if images.ndim == 3 and channels == 1:
            self._facts["images have no channel: taken as [N, height, width]"] = None
            images = images[:, None]
        elif images.ndim == 4 and images.shape[3] == channels != images.shape[1]:
            self._facts["channels come last: taken as [N, height, width, channels]"] = None
            images = images.permute(0, 3, 1, 2)
        if images.ndim != 4 or images.shape[1] != channels:
            raise ArgumentError(
                self.argument,
                f"its images are {tuple(images.shape[1:])}, the model takes {spec.shape}",
                "Pass images [N, channels, height, width].",
            )
        if list(images.shape[2:]) != size:
            if self.exact_size:
                raise ArgumentError(
                    self.argument,
                    f"its images are {tuple(images.shape[1:])}, the model takes {spec.shape}",
                    "Pass images [N, channels, height, width] of the model's size.",
                )
            height, width = images.shape[2:]
            text = (
                f"images are {height} x {width}, the model states {size[0]} x {size[1]} "
                f"({spec.source}); they are not resized"
            )
            self._doubts[text] = None
        return images


def _show(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)

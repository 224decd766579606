"""Brings labelled images into the form that a model takes, and says what it assumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..models.input_spec import InputSpec

# The share of the range of the model's images by which others may lie beyond it: the channels'
# ranges differ, and resizing with a bicubic filter overshoots.
_TOLERANCE = 0.15
# Pictures together usually cover more of the range than this share.
_NARROW = 0.1


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
    _brightest: int = -1  # of uint8 images

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
            self._brightest = max(self._brightest, int(images.max()) if images.numel() else 0)
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
        if self._lowest <= self._highest:
            self._check_range()
        if 0 <= self._brightest <= 1:
            self._doubts[
                f"images are uint8, and no pixel exceeds {self._brightest} of 255, as if they were "
                f"rounded after they were scaled to 0..1, or masks: pass pixels in 0..255"
            ] = None
        facts, doubts = ([f"{self.argument}: {n}" for n in d] for d in (self._facts, self._doubts))
        return facts, doubts

    def _check_range(self) -> None:
        """Notes float images whose range is not that of the images that the model takes."""
        found = f"{self._lowest:.3g} to {self._highest:.3g}"
        form = _recognise(self._lowest, self._highest)
        if self.spec is None:
            if form:
                self._doubts[
                    f"float images are run as they are, and theirs lie in {found}, {form}; the "
                    f"model does not state its mean and std, so it is taken to be trained on such "
                    f"images. If it was not, normalise them, or pass uint8 images, mean and std"
                ] = None
            return
        low, high = float(self.spec.low.min()), float(self.spec.high.max())
        margin = _TOLERANCE * (high - low)
        # few pictures, all dark, cover little of the range too, but they lie within it
        narrow = 0 < self._highest - self._lowest < _NARROW * (high - low)
        outside = self._lowest < low - margin or self._highest > high + margin
        outside |= narrow and self._lowest < low - 1e-3
        fits = abs(low - self._lowest) <= margin and abs(high - self._highest) <= margin
        if not (outside or (form and not fits)):
            return
        guess = ", a guess" if self.spec.assumed else ""
        self._doubts[
            f"float images are run as they are, and theirs lie in {found}, "
            f"{form or 'as if they were normalised otherwise'}; the model takes {low:.3g} to "
            f"{high:.3g}, by mean {_show(self.spec.mean)} and std {_show(self.spec.std)} "
            f"({self.spec.source}{guess})"
        ] = None

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


def _recognise(lowest: float, highest: float) -> str:
    """How images of this range look, or "" if that can't be told."""
    if 0 <= lowest <= 0.1 and 0.9 <= highest <= 1:
        return "as if they were not normalised (0 to 1)"
    if lowest >= 0 and 128 <= highest <= 256:
        return "as if they were not normalised (0 to 255)"
    if -1 <= lowest <= -0.95 and 0.95 <= highest <= 1:
        return "as if normalised with mean 0.5 and std 0.5 (-1 to 1)"
    return ""


def _show(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)

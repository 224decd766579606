"""Scenes: images that look like the world without being of it, drawn from chance alone.

"Dead leaves": shapes of all sizes that hide each other, over and filled with 1/f noise. They have
the edges, occlusions and spectra of photographs, and were found good enough to train features on
(Baradad et al., "Learning to See by Looking at Noise", 2021). No data goes in: they are what deep
forgetting keeps the features right on, where impressions are too far from any real image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

_SHAPES = 40  # leaves an image
_SMALLEST, _LARGEST = 0.04, 0.6  # their radius, in image widths, with density ~ radius^-3
_CHUNK = 256
_PIXELS = 1 << 15  # of images whose leaves are laid at once: of a large one, where the leaf lies


def draw_scenes(count: int, shape: Sequence[int], seed: int) -> Tensor:
    """``count`` scenes, float32 [count, *shape] in 0..1; a function of the arguments alone.

    Args:
        count: how many.
        shape: (channels, height, width); of a vector (n,), independent noise comes back.
        seed: draws all of them.
    """
    chunks = list(scene_chunks(count, shape, seed))
    return torch.cat(chunks) if chunks else torch.empty(0, *shape)


def scene_chunks(count: int, shape: Sequence[int], seed: int) -> Iterator[Tensor]:
    """`draw_scenes`, at most 256 at a time."""
    draw = torch.Generator().manual_seed(seed)
    for at in range(0, count, _CHUNK):
        size = min(_CHUNK, count - at)
        if len(shape) == 1:
            yield torch.randn(size, *shape, generator=draw).mul(0.25).add(0.5).clamp(0, 1)
        else:
            channels, height, width = shape
            yield _leaves(size, channels, height, width, draw)


def _leaves(count: int, channels: int, height: int, width: int, draw: torch.Generator) -> Tensor:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(count, *shape).uniform_(low, high, generator=draw)

    image = _coloured_noise(count, channels, height, width, draw)
    texture = _coloured_noise(count, channels, height, width, draw)
    leaves = [_Leaf.chance(channels, uniform) for _ in range(_SHAPES)]
    blur = uniform(0, 1, 1, 1, 1)
    few = max(1, _PIXELS // (height * width))
    for at in range(0, count, few):
        part = slice(at, at + few)
        for number, leaf in enumerate(leaves):
            leaf.pick(part).lie_on(image[part], texture[part], 5 * number)
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(channels, 1, 3, 3)
    blurred = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)
    return image.lerp(blurred, blur)


@dataclass(frozen=True)
class _Leaf:
    """A leaf in each of N images, [N, 1, 1] or [N, channels or 1, 1, 1]; lengths in image widths.

    Attributes:
        radius, stretch, angle: its half axes are radius * stretch and radius / stretch.
        left, top: of its middle.
        edged: whether it is a box, not an ellipse.
        colour, rough, down, right: how bright it is, how much of the texture shows, and how much
            brighter it gets downwards and to the right.
    """

    radius: Tensor
    stretch: Tensor
    angle: Tensor
    left: Tensor
    top: Tensor
    edged: Tensor
    colour: Tensor
    rough: Tensor
    down: Tensor
    right: Tensor

    @classmethod
    def chance(cls, channels: int, uniform: Callable[..., Tensor]) -> _Leaf:
        mix = uniform(0, 1, 1, 1)
        return cls(
            radius=(_SMALLEST**-2 * (1 - mix) + _LARGEST**-2 * mix).rsqrt(),
            stretch=uniform(-0.7, 0.7, 1, 1).exp(),
            angle=uniform(0, math.pi, 1, 1),
            left=uniform(-0.1, 1.1, 1, 1),
            top=uniform(-0.1, 1.1, 1, 1),
            edged=uniform(0, 1, 1, 1) < 0.4,
            colour=uniform(0, 0.6, channels, 1, 1) + uniform(0, 0.4, 1, 1, 1),
            rough=uniform(0, 1, 1, 1, 1).square(),
            down=uniform(-0.3, 0.3, 1, 1, 1),
            right=uniform(-0.3, 0.3, 1, 1, 1),
        )

    def pick(self, part: slice) -> _Leaf:
        """Those of some of the images."""
        return _Leaf(*[getattr(self, f.name)[part] for f in fields(self)])

    def lie_on(self, image: Tensor, texture: Tensor, shift: int) -> None:
        """Hides what is under it in ``image`` [N, channels, H, W], where the window ends.

        ``texture``, of the same shape, is moved to the right by ``shift``.
        """
        height, width = image.shape[2:]
        cos, sin = self.angle.cos(), self.angle.sin()
        long, short = self.radius * self.stretch, self.radius / self.stretch
        down, right = long * sin.abs() + short * cos.abs(), long * cos.abs() + short * sin.abs()
        rows, columns = _window(self.top, down, height), _window(self.left, right, width)
        y = torch.linspace(0, 1, height)[rows, None]
        x = torch.linspace(0, 1, width)[None, columns]
        dx, dy = x - self.left, y - self.top
        along = (dx * cos + dy * sin) / long
        across = (dy * cos - dx * sin) * self.stretch / self.radius
        ellipse = along.square() + across.square() < 1
        box = (along.abs() < 0.9) & (across.abs() < 0.9)
        inside = torch.where(self.edged, box, ellipse)[:, None]
        moved = (torch.arange(width)[columns] - shift) % width
        rough = self.rough * (texture[:, :, rows].index_select(3, moved) - 0.5)
        shade = self.down * (y - 0.5) + self.right * (x - 0.5)
        under = image[:, :, rows, columns]
        under.copy_(torch.where(inside, (self.colour + rough + shade).clamp(0, 1), under))


def _window(middle: Tensor, reach: Tensor, size: int) -> slice:
    """Pixels, and two more, that lie within ``reach`` of any of ``middle``, in image widths."""
    first = math.floor(float((middle - reach).min()) * (size - 1)) - 2
    last = math.ceil(float((middle + reach).max()) * (size - 1)) + 2
    return slice(min(max(first, 0), size), max(min(last + 1, size), 0))


def _coloured_noise(
    count: int, channels: int, height: int, width: int, draw: torch.Generator
) -> Tensor:
    """Noise whose amplitude falls as frequency^-a, a in 0.5..2, of chance colour and contrast."""
    vertical, horizontal = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    frequency = (vertical.square() + horizontal.square()).sqrt().clamp(min=1 / max(height, width))
    slope = torch.empty(count, 1, 1, 1).uniform_(0.5, 2, generator=draw)
    spectrum = torch.fft.rfft2(torch.randn(count, channels, height, width, generator=draw))
    spectrum = spectrum * frequency ** (-slope)
    spectrum[..., 0, 0] = 0
    noise = torch.fft.irfft2(spectrum, s=(height, width))
    noise = noise / noise.std((2, 3), keepdim=True).clamp(min=1e-6)
    # channels mostly go together, as brightness does
    colours = 0.4 * torch.randn(count, channels, channels, generator=draw) + 1
    noise = torch.einsum("nij,njhw->nihw", colours, noise)
    mean = torch.empty(count, 1, 1, 1).uniform_(0.25, 0.75, generator=draw)
    mean = mean + 0.1 * torch.randn(count, channels, 1, 1, generator=draw)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.05, 0.3, generator=draw)
    noise = noise / noise.std((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return (mean + contrast * noise).clamp(0, 1)

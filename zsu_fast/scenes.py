"""Scenes: images that look like the world without being of it, drawn from chance alone.

"Dead leaves": shapes of all sizes that hide each other, over and filled with 1/f noise. They have
the edges, occlusions and spectra of photographs, and were found good enough to train features on
(Baradad et al., "Learning to See by Looking at Noise", 2021). No data goes in: they are what deep
forgetting keeps the features right on, where impressions are too far from any real image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_SHAPES = 40  # leaves an image
_SMALLEST, _LARGEST = 0.04, 0.6  # their radius, in image widths, with density ~ radius^-3
_CHUNK = 256


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
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    for number in range(_SHAPES):
        mix = uniform(0, 1, 1, 1)
        radius = (_SMALLEST**-2 * (1 - mix) + _LARGEST**-2 * mix).rsqrt()
        stretch, angle = uniform(-0.7, 0.7, 1, 1).exp(), uniform(0, math.pi, 1, 1)
        dx, dy = x - uniform(-0.1, 1.1, 1, 1), y - uniform(-0.1, 1.1, 1, 1)
        along = (dx * angle.cos() + dy * angle.sin()) / (radius * stretch)
        across = (dy * angle.cos() - dx * angle.sin()) * stretch / radius
        ellipse = along.square() + across.square() < 1
        box = (along.abs() < 0.9) & (across.abs() < 0.9)
        inside = torch.where(uniform(0, 1, 1, 1) < 0.4, box, ellipse)[:, None]
        colour = uniform(0, 0.6, channels, 1, 1) + uniform(0, 0.4, 1, 1, 1)
        rough = uniform(0, 1, 1, 1, 1).square() * (texture.roll(5 * number, 3) - 0.5)
        shade = uniform(-0.3, 0.3, 1, 1, 1) * (y - 0.5) + uniform(-0.3, 0.3, 1, 1, 1) * (x - 0.5)
        image = torch.where(inside, (colour + rough + shade).clamp(0, 1), image)
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(channels, 1, 3, 3)
    blurred = F.conv2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), kernel, groups=channels)
    return image.lerp(blurred, uniform(0, 1, 1, 1, 1))


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

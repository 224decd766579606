"""Layers in the order in which they run, Fisher's ratio at their inputs, and small batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splits import CPU, split_before
from support import tiny, tiny_data
from torch import Tensor, nn

from zsu_fast.models.wrapper import working_copy
from zsu_fast.splitting import layers
from zsu_fast.splitting.layers import fisher_ratios, layer_names
from zsu_fast.splitting.split import find_split


def test_backbones_run_in_chunks_that_fit() -> None:
    images = tiny_data(30)[0]
    found = split_before(tiny(), "fc1", images)
    (whole,) = found.features(images, batch=30)
    seen: list[int] = []
    found.backbone.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    map_bytes = 8 * 3 * 3 * 4  # of the convolution's output, per image; the image itself: 768
    assert map_bytes < 768
    (parts,) = found.features(images, chunk_bytes=10 * 768)
    assert seen == [1, 1, 1, 10, 10, 9]  # the first two find the layout
    assert torch.allclose(whole, parts, atol=1e-6)


def test_on_a_cpu_the_maps_of_a_chunk_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    images = tiny_data(60)[0]
    monkeypatch.setattr(layers, "_CACHE_BYTES", 20 * 768)
    assert [len(chunk) for chunk in chunks_of(images)] == [1, 20, 20, 19]
    monkeypatch.setattr(layers, "_CACHE_BYTES", 768)
    assert [len(chunk) for chunk in chunks_of(images)] == [1, 16, 16, 16, 11]


def chunks_of(images: Tensor) -> list[Tensor]:
    model, chunks = tiny(), []
    for chunk in layers.in_chunks(model, images):
        model(chunk)  # hooks measure its maps
        chunks.append(chunk)
    return chunks


def test_layers_in_the_order_of_the_forward_pass() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(4, 3), nn.Linear(4, 4)
            self.norm, self.unused = nn.LayerNorm(4), nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.second(self.norm(self.first(x)))

    assert layer_names(Backwards(), torch.randn(2, 4)) == ["first", "second"]


class Tokens(nn.Module):
    """Classes are separated by the first token alone, or by the mean of the others."""

    def __init__(self, first: bool, sequence_first: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)
        self.first, self.sequence_first = first, sequence_first
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:  # [N, 8, 4]
        x = self.a(x.transpose(0, 1)).transpose(0, 1) if self.sequence_first else self.a(x)
        return self.b(x[:, 0] if self.first else x.mean(1))


@pytest.mark.parametrize("sequence_first", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_ratio_of_tokens(first: bool, sequence_first: bool) -> None:
    labels = torch.arange(60) % 2
    images = torch.randn(60, 8, 4)
    signal = (labels * 2.0 - 1)[:, None]
    if first:
        images[:, 0] = signal + 0.1 * images[:, 0]
        images[:, 1:] *= 10  # the mean is noise
    else:
        images = signal[:, None] + 3 * images - 2.9 * images.mean(1, keepdim=True)
    model = working_copy(Tokens(first, sequence_first), CPU)
    ratios = dict(fisher_ratios(model, images, labels))
    assert ratios["a"] == pytest.approx(ratios["b"], rel=0.01)
    assert ratios["a"] > 5


def test_the_ratio_of_maps_with_channels_last() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mlp, self.out = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.conv.weight.copy_(torch.eye(8).view(8, 8, 1, 1))
                self.conv.bias.zero_()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.mlp(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))

    labels = torch.arange(40) % 2
    images = torch.randn(40, 8, 16, 16)
    images[:, 3] += labels.view(-1, 1, 1)  # one channel, everywhere
    ratios = dict(fisher_ratios(working_copy(Swapped(), CPU), images, labels))
    assert ratios["mlp"] == pytest.approx(ratios["conv"], rel=1e-3)


def test_the_ratio_of_many_impressions_takes_a_sample() -> None:
    seen: list[int] = []
    model = working_copy(tiny(), CPU)
    images = torch.rand(160, 3, 8, 8)
    model.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    fisher_ratios(model, images, torch.arange(160) // 4, most_images=40)
    # two more find the layout; those of `layer_names` go to the inner model
    assert sum(seen) == 40 + 2


def test_the_ratio_rises_where_classes_separate() -> None:
    class Late(nn.Module):
        """Its first layer mixes noise in; only after the second are the classes separated."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.c = nn.Linear(4, 2)
            with torch.no_grad():
                self.a.weight.copy_(torch.eye(4))
                self.b.weight.copy_(torch.diag(torch.tensor([5.0, 0, 0, 0])))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    labels = torch.arange(64) % 2
    images = torch.randn(64, 4)
    images[:, 0] = labels * 2.0 - 1 + 0.1 * images[:, 0]
    model = working_copy(Late(), CPU)
    ratios = dict(fisher_ratios(model, images, labels))
    assert list(ratios) == ["a", "b", "c"]
    assert ratios["a"] == pytest.approx(ratios["b"], rel=1e-3)
    assert ratios["c"] > 20 * ratios["b"]
    found = find_split(model, "auto", images, labels)
    assert found.name == "c"
    assert "first responsive layer" in found.reason


def test_auto_takes_the_first_of_equally_good_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight.copy_(torch.eye(4))
    labels = torch.arange(32) % 2
    images = torch.randn(32, 4) + labels[:, None]
    assert find_split(working_copy(model, CPU), "auto", images, labels).name == "0"

"""Layers in the order in which they run; batches whose feature maps stay small."""

from __future__ import annotations

from typing import Any

import torch
from splits import split_before
from support import tiny, tiny_data
from torch import nn

from zsu_fast.splitting.layers import layer_names


def test_backbones_run_in_chunks_that_fit() -> None:
    images = tiny_data(30)[0]
    found = split_before(tiny(), "fc1", images)
    (whole,) = found.features(images, batch=30)
    seen: list[int] = []
    found.backbone.register_forward_pre_hook(lambda _m, args: seen.append(len(args[0])))
    map_bytes = 8 * 3 * 3 * 4  # of the convolution's output, per image; the image itself: 768
    assert map_bytes < 768
    (parts,) = found.features(images, chunk_bytes=10 * 768)
    assert seen == [1, 10, 10, 9]
    assert torch.allclose(whole, parts, atol=1e-6)


def test_layers_in_the_order_of_the_forward_pass() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(4, 3), nn.Linear(4, 4)
            self.norm, self.unused = nn.LayerNorm(4), nn.Linear(2, 2)

        def forward(self, x: Any) -> Any:
            return self.second(self.norm(self.first(x)))

    assert layer_names(Backwards(), torch.randn(2, 4)) == ["first", "second"]

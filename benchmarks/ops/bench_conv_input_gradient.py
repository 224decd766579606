"""The input gradient of a convolution of images: conv_input_gradient against torch's.

    pytest benchmarks/ops/bench_conv_input_gradient.py

First layers of SqueezeNet 1.0, ResNet, EfficientNet-lite0 and ResNet-20, channels-last, float32.
`torch` is `convolution_backward` for the input alone. `without the op` is what the ascent does
then: a convolution without stride, whose channels are the pixels of a stride. The floor is the
forward pass of the same convolution, which has as many multiplications.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import DEVICE, Contender, Table, compare
from zsu_fast.ops.conv_input_gradient import conv_input_gradient, packed_weight
from zsu_fast.synthesis.depthwise import library_gradient
from zsu_fast.synthesis.frozen_conv import FrozenConv, _phase_weights

# batch, outputs, size, kernel, stride, padding
LAYERS = [
    (16, 96, 224, 7, 2, 0), (16, 64, 224, 7, 2, 3), (16, 32, 224, 3, 2, 1), (64, 16, 32, 3, 1, 1),
]  # fmt: skip
FLOOR = "floor: the forward pass"


@pytest.mark.skipif(DEVICE != "cpu", reason="a CPU kernel")
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: "x".join(map(str, s)))
def test_conv_input_gradient(benchmark: Any, table: Table, layer: tuple[int, ...]) -> None:
    batch, outputs, size, kernel, stride, padding = layer
    conv = nn.Conv2d(3, outputs, kernel, stride, padding, bias=False).requires_grad_(False)
    conv = conv.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    weight, packed = conv.weight, packed_weight(conv.weight)
    grad = torch.randn_like(conv(x))
    steps, borders = (stride, stride), (padding, padding)
    frozen = FrozenConv(conv)
    frozen.packed, frozen.phases = None, _phase_weights(weight, stride) if stride > 1 else None

    def torchs() -> Tensor:
        return library_gradient(grad, x.shape, weight, steps, borders, 1)

    def ours() -> Tensor:
        return conv_input_gradient(grad, packed, stride, borders, (size, size))

    exact = torchs()

    def check(got: Tensor) -> None:
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-4)

    contenders = [
        Contender("torch", torchs, check),
        Contender("without the op", lambda: frozen.input_gradient(grad, x.shape), check),
        Contender("conv_input_gradient", ours, check),
        Contender(FLOOR, lambda: F.conv2d(x, weight, None, stride, padding)),
    ]
    name = f"{batch} x 3 x {size} x {size} to {outputs}, {kernel}x{kernel} by {stride}"
    compare(table, name, contenders, floor=FLOOR, rounds=15)
    benchmark.pedantic(ours, rounds=3)

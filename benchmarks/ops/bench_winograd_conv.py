"""Convolution of 3x3 with constant weights: winograd_conv against the library's convolution.

    pytest benchmarks/ops/bench_winograd_conv.py

Layers of ResNet-18, SqueezeNet 1.0 and ResNet-20, each with bias and relu. With inputs and outputs
exchanged they are the layers' input gradients. `oneDNN` is the convolution that frozen layers run
otherwise, on the same channels-last maps, activation included. `Winograd` includes its transforms
of inputs and outputs; its weights are transformed once, before. The floor is the time of as many
multiplications as Winograd needs, in one convolution of 1x1 by oneDNN from 256 to 256 channels.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import DEVICE, Contender, Table, compare
from zsu_fast.ops.winograd_conv import winograd_conv, winograd_weight
from zsu_fast.synthesis.frozen_conv import Activation, FrozenConv

# batch, inputs, size, outputs
LAYERS = [
    (16, 64, 56, 64), (16, 128, 28, 128), (16, 256, 14, 256), (16, 512, 7, 512),  # ResNet-18
    (8, 64, 56, 64), (8, 512, 7, 512),
    (16, 16, 55, 64), (16, 64, 55, 16), (16, 32, 27, 128), (16, 128, 27, 32),  # SqueezeNet
    (16, 48, 13, 192), (16, 192, 13, 48), (16, 64, 13, 256), (16, 256, 13, 64),
    (32, 16, 32, 16), (32, 32, 16, 32), (32, 64, 8, 64),  # ResNet-20
]  # fmt: skip
FLOOR, WIDE = "floor: multiplications, by oneDNN", 256


def frozen(weight: Tensor, bias: Tensor) -> FrozenConv:
    """A convolution with relu that keeps the size of its maps, by oneDNN."""
    outputs, inputs, kernel, _ = weight.shape
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
    return FrozenConv(conv, Activation("relu"))


@pytest.mark.skipif(DEVICE != "cpu", reason="a CPU kernel")
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: "x".join(map(str, s)))
def test_winograd_conv(benchmark: Any, table: Table, layer: tuple[int, ...]) -> None:
    batch, inputs, size, outputs = layer
    last = torch.channels_last
    x = torch.randn(batch, inputs, size, size).contiguous(memory_format=last)
    weight = torch.randn(outputs, inputs, 3, 3) / math.sqrt(9 * inputs)
    bias, transformed = torch.randn(outputs), winograd_weight(weight)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    errors: dict[str, float] = {}

    def verify(name: str, limit: float) -> Any:
        def check(out: Tensor) -> None:
            errors[name] = float((out - exact).norm() / exact.norm())
            assert errors[name] < limit

        return check

    flop = 2 * 36 * batch * math.ceil(size / 4) ** 2 * inputs * outputs
    dense = torch.randn(1, WIDE, flop // (2 * WIDE**2), 1).contiguous(memory_format=last)
    library = frozen(weight, bias)
    floor = frozen(torch.randn(WIDE, WIDE, 1, 1), torch.zeros(WIDE))

    def ours() -> Tensor:
        return winograd_conv(x, transformed, bias, outputs, 1, (0.0, math.inf))

    case = f"{batch} x {inputs} x {size} x {size} to {outputs}"
    compare(
        table, case,
        [
            Contender("oneDNN", lambda: library.output(x), verify("oneDNN", 4e-6)),
            Contender("Winograd", ours, verify("Winograd", 4e-6)),
            Contender(FLOOR, lambda: floor.output(dense)),
        ],
        floor=FLOOR, rounds=15,
    )  # fmt: skip
    direct = 2 * 9 * batch * size**2 * inputs * outputs
    table.notes.append(
        f"{case}: {direct / 1e9:.3f} GFLOP, by Winograd {flop / 1e9:.3f};"
        f" errors, relative to the output's norm in float64: oneDNN {errors['oneDNN']:.1e},"
        f" Winograd {errors['Winograd']:.1e}"
    )
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)

"""Convolutions of few channels: blocked_conv, of blocks of 16 images, against torch's.

    pytest benchmarks/ops/bench_blocked_conv.py

The layers of LeNet5 and KarpathyNet, and the first two of ResNet-20, forward and input gradient, in
float32. torch computes them in whichever of its two layouts is faster; maps are in the layout that
a contender takes. The floor is the time of the layer's multiplications, those with padding left
out, in one matrix product.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import DEVICE, Contender, Table, compare
from zsu_fast.ops.blocked_conv import from_blocks, to_blocks
from zsu_fast.synthesis.depthwise import library_gradient
from zsu_fast.synthesis.image_blocks import BlockedConv

BATCH = 64
FLOOR, WIDE = "floor: multiplications, in a matrix product", 256
# inputs, outputs, size, kernel, padding
LAYERS = [
    (1, 6, 28, 5, 2), (6, 16, 14, 5, 0), (3, 16, 32, 5, 2), (16, 20, 16, 5, 2), (20, 20, 8, 5, 2),
    (3, 16, 32, 3, 1), (16, 16, 32, 3, 1),
]  # fmt: skip


def useful_work(inputs: int, outputs: int, size: int, kernel: int, padding: int) -> int:
    """Multiply-adds of one image whose input is not padding."""
    ones = F.conv2d(torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel), padding=padding)
    return int(ones.sum()) * inputs * outputs


@pytest.mark.skipif(DEVICE != "cpu", reason="a CPU kernel")
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: "x".join(map(str, s)))
def test_blocked_conv(benchmark: Any, table: Table, layer: tuple[int, ...], gradient: bool) -> None:
    inputs, outputs, size, kernel, padding = layer
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding).requires_grad_(False)
    blocked = BlockedConv(conv)
    x = torch.randn(BATCH, inputs, size, size)
    grad = torch.randn_like(conv(x))
    x_blocks, grad_blocks = to_blocks(x), to_blocks(grad)

    def torchs(layout: torch.memory_format) -> Any:
        weight, bias = conv.weight.to(memory_format=layout), conv.bias
        maps, given = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
        if not gradient:
            return lambda: F.conv2d(maps, weight, bias, padding=padding)
        borders = (padding, padding)
        return lambda: library_gradient(given, x.shape, weight, (1, 1), borders, 1)

    def ours() -> Tensor:
        if gradient:
            return blocked.input_gradient(grad_blocks, (size, size))
        return blocked.output(x_blocks)

    exact = torchs(torch.contiguous_format)()

    def check(got: Tensor) -> None:
        got = from_blocks(got, BATCH) if got.ndim == 5 else got
        torch.testing.assert_close(got, exact, rtol=1e-3, atol=1e-4)

    work = BATCH * useful_work(inputs, outputs, size, kernel, padding)
    dense, square = torch.randn(work // WIDE**2, WIDE), torch.randn(WIDE, WIDE)
    contenders = [
        Contender("torch, contiguous", torchs(torch.contiguous_format), check),
        Contender("torch, channels-last", torchs(torch.channels_last), check),
        Contender("blocked_conv", ours, check),
        Contender(FLOOR, lambda: torch.mm(dense, square)),
    ]
    what = "input gradient" if gradient else "forward"
    name = f"{BATCH} x {inputs} x {size} x {size} to {outputs}, {kernel}x{kernel}, {what}"
    compare(table, name, contenders, floor=FLOOR, rounds=15)
    benchmark.pedantic(ours, rounds=3)

"""Max pooling with relu, forward and input gradient: max_pool against torch's.

    pytest benchmarks/ops/bench_max_pool.py

Layers of LeNet5, KarpathyNet, SqueezeNet 1.0 and ResNet, on channels-last maps in float32 and in
bfloat16. `torch` is `F.max_pool2d` and `F.relu` with autograd. The floor is a copy of the input:
forward and backward pass read and write one, besides smaller tensors.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import DEVICE, Contender, Table, compare
from zsu_fast.ops.max_pool import max_pool

# batch, channels, size, kernel, stride, padding
LAYERS = [
    (128, 6, 28, 2, 2, 0), (128, 16, 10, 2, 2, 0),  # LeNet5
    (96, 16, 32, 2, 2, 0), (96, 20, 16, 2, 2, 0),  # KarpathyNet
    (16, 96, 109, 3, 2, 0), (16, 256, 54, 3, 2, 0),  # SqueezeNet
    (16, 64, 112, 3, 2, 1),  # ResNet-18 and ResNet-50
]  # fmt: skip
FLOOR = "floor: a copy of the input"


@pytest.mark.skipif(DEVICE != "cpu", reason="a CPU kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: "x".join(map(str, s)))
def test_max_pool(benchmark: Any, table: Table, layer: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, channels, size, kernel, stride, padding = layer
    x = torch.randn(batch, channels, size, size).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = F.max_pool2d(x, kernel, stride, padding).relu()
    grad = torch.randn_like(out)
    (exact,) = torch.autograd.grad(out, x, grad)
    target = torch.empty_like(x.detach())

    def both(out: Tensor) -> tuple[Tensor, Tensor]:
        return out, torch.autograd.grad(out, x, grad)[0]

    def torchs() -> tuple[Tensor, Tensor]:
        return both(F.relu(F.max_pool2d(x, kernel, stride, padding)))

    def ours() -> tuple[Tensor, Tensor]:
        return both(max_pool(x, kernel, stride, padding, relu=True))

    def check(got: tuple[Tensor, Tensor]) -> None:
        assert torch.equal(got[0], out)
        torch.testing.assert_close(got[1], exact, rtol=5e-2, atol=5e-2)

    name = f"{batch} x {channels} x {size} x {size}, {kernel}x{kernel}, {str(dtype)[6:]}"
    contenders = [
        Contender("torch", torchs, check),
        Contender("max_pool", ours, check),
        Contender(FLOOR, lambda: target.copy_(x.detach())),
    ]
    compare(table, name, contenders, floor=FLOOR, rounds=15)
    benchmark.pedantic(ours, rounds=3)

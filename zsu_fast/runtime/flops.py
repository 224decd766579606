"""Counts the multiply-adds of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def multiply_adds(module: nn.Module, *inputs: Tensor) -> int:
    """Multiply-adds of the convolutions and linear layers in ``module(*inputs)``."""
    total = 0

    def count(layer: nn.Module, _args: Any, output: Any) -> None:
        nonlocal total
        weight = layer.weight
        if isinstance(output, Tensor) and isinstance(weight, Tensor):
            outputs = output.numel()
            total += outputs * weight[0].numel()

    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total

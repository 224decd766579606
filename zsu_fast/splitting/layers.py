"""A model's layers with weights in the order of the forward pass; batches of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.hooks import forward_hooks, forward_pre_hooks

# Bytes of the largest feature map of one chunk.
CHUNK_BYTES = 128 * 1024 * 1024


def layer_names(model: nn.Module, images: Tensor) -> list[str]:
    """Names of the modules that own a weight matrix, in the order in which they first run.

    A normalisation layer owns none and belongs to the layer before it. A weight behind a
    parametrization (`torch.nn.utils.parametrizations`) counts as the layer's own.
    """
    names = {
        module: name
        for name, module in model.named_modules()
        if name and ".parametrizations" not in f".{name}" and _has_matrix(module)
    }
    order: dict[str, None] = {}

    def note(module: nn.Module, _args: Any, _kwargs: Any) -> None:
        order.setdefault(names[module])

    with forward_pre_hooks(names, note), torch.no_grad():
        model(images)
    return list(order)


def _has_matrix(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    parametrizations = getattr(module, "parametrizations", None)
    if isinstance(parametrizations, nn.ModuleDict):
        own += list(parametrizations.parameters())
    return any(p.ndim > 1 for p in own)


def in_chunks(model: nn.Module, images: Tensor, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
    """Yields ``images`` in chunks whose largest feature map takes at most ``chunk_bytes``.

    The first image is a chunk of its own: the caller runs it, and hooks measure its feature maps.
    """
    largest = images[:1].numel() * images.element_size()

    def measure(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal largest
        for item in output if isinstance(output, tuple | list) else (output,):
            if isinstance(item, Tensor):
                largest = max(largest, item.numel() * item.element_size())

    with forward_hooks(model.modules(), measure):
        yield images[:1]
    others = images[1:]
    if len(others):
        yield from others.split(max(1, chunk_bytes // largest))

"""A model's layers with weights, in the order of the forward pass, and running it in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# A head's evaluation in chunks keeps its largest feature maps below this.
_CHUNK_BYTES = 128 * 1024 * 1024


def layer_names(model: nn.Module, images: Tensor) -> list[str]:
    """Modules with a weight matrix of their own, in the order in which a forward pass calls them.

    Normalisation layers have none: they belong to the layer before them. A weight behind a
    parametrization (`torch.nn.utils.parametrizations`) counts as the layer's own.
    """
    order: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if name and ".parametrizations" not in f".{name}" and _has_matrix(module):

            def note(_module: nn.Module, _args: Any, name: str = name) -> None:
                if name not in order:
                    order.append(name)

            hooks.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return order


def _has_matrix(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    behind = getattr(module, "parametrizations", None)
    if isinstance(behind, nn.ModuleDict):
        own += list(behind.parameters())
    return any(p.ndim > 1 for p in own)


def in_chunks(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """``images`` in chunks whose largest feature map stays below 128 MiB.

    How large it is is measured on the first image, which is a chunk of its own.
    """
    largest = images[:1].numel() * images.element_size()

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal largest
        for item in output if isinstance(output, tuple | list) else (output,):
            if isinstance(item, Tensor):
                largest = max(largest, item.numel() * item.element_size())

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield images[:1]
    finally:
        for hook in hooks:
            hook.remove()
    rest = images[1:]
    if len(rest):
        yield from rest.split(max(1, _CHUNK_BYTES // largest))

"""Dicts of tensors that a model keeps from one call to the next, such as timm's attention biases.

They are computed from weights, so they are stale once those have changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class _Uncached(dict[Any, Any]):
    """A dict that stores for the current call only: every look-up for a key finds none."""

    def __contains__(self, _key: object) -> bool:
        return False

    def get(self, _key: Any, default: Any = None) -> Any:
        return default


def stop_caching(model: nn.Module) -> None:
    """Replaces the caches that a forward pass with gradients has filled, in a working copy."""
    for module, name, values in _dicts_of_tensors(model):
        if any(tensor.grad_fn is not None for tensor in values.values()):
            setattr(module, name, _Uncached(values))


def clear_caches(model: nn.Module) -> None:
    """Calls ``train()``, at which models clear their caches; the modes stay. Nothing without any.

    The mode of each module is restored by its flag, since ``eval()`` may fill the caches again.
    """
    if next(_dicts_of_tensors(model), None) is None:
        return
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    for module, mode in modes:
        module.training = mode


def _dicts_of_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict[Any, Any]]]:
    own = set(vars(nn.Module()))
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name in own or not isinstance(value, dict) or not value:
                continue
            if all(isinstance(tensor, Tensor) for tensor in value.values()):
                yield module, name, value

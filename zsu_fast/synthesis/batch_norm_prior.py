"""DeepInversion's feature regulariser (Yin et al., "Dreaming to Distill", 2020, equation 4).

It pulls the features of a batch towards the statistics that the model's BatchNorm layers recorded
in training.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import ArgumentError
from .inference_copy import InferenceCopy
from .space import SearchSpace


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of ``module`` that have recorded statistics."""
    layers = (m for m in module.modules() if isinstance(m, _BatchNorm))
    return [layer for layer in layers if layer.running_mean is not None]


class BatchNormStatistics(nn.Module):
    """A model that measures how far its features are from the recorded BatchNorm statistics.

    Args:
        module: the model; its layers get hooks, and BatchNorm must not be folded away.

    Raises:
        ArgumentError: it has no BatchNorm with running statistics.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._terms: list[Tensor] = []
        layers = batch_norms(module)
        if not layers:
            raise ArgumentError(
                "batch_norm", "given for a model without BatchNorm statistics", "Leave it at 0."
            )
        for layer in layers:
            layer.register_forward_pre_hook(self._note)

    def _note(self, layer: Any, args: tuple[Any, ...]) -> None:
        x = args[0]
        variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        self._terms.append(torch.linalg.vector_norm(mean - layer.running_mean))
        self._terms.append(torch.linalg.vector_norm(variance - layer.running_var))

    def forward(self, x: Tensor) -> Tensor:
        self._terms.clear()
        logits: Tensor = self.module(x)
        return logits

    def distance(self) -> Tensor:
        """For the last batch, scalar: the L2 distances of the channels' means and of their
        variances from the recorded ones, summed over the layers.
        """
        return torch.stack(self._terms).sum()


def with_batch_norm_prior(space: SearchSpace, weight: float) -> SearchSpace:
    """``space`` with the regulariser, on a copy of the model whose BatchNorm is not folded away.

    Args:
        space: of images, unless ``weight`` is 0, which returns ``space`` itself.
        weight: `AscentSettings.batch_norm`.

    Raises:
        ArgumentError: the points are no images, or the model has no BatchNorm statistics.
    """
    if not weight:
        return space
    if space.name != "input" or len(space.shape) != 3:
        raise ArgumentError(
            "batch_norm",
            f"got {weight!r} for points of shape {space.shape} in the space {space.name!r}",
            "Leave it at 0: it needs images.",
        )
    statistics = BatchNormStatistics(copy.deepcopy(space.exact).requires_grad_(False))
    fast_model = InferenceCopy(statistics, False, torch.float32, False)
    return replace(space, fast_model=fast_model, regulariser=statistics.distance)

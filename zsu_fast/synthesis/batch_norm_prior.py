"""The BatchNorm prior: how far features are from the statistics that BatchNorm layers keep."""

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


class BatchNormStatistics(nn.Module):
    """A model that tells how far its features are from those that BatchNorm saw in training.

    Args:
        model: its layers get hooks; BatchNorm must not be folded away.

    Raises:
        ArgumentError: it has no BatchNorm with running statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._terms: list[Tensor] = []
        layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        layers = [m for m in layers if m.running_mean is not None]
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
        logits: Tensor = self.model(x)
        return logits

    def distance(self) -> Tensor:
        """Of the last batch, scalar: over the layers, the sum of the L2 distances of the channels'
        means and of their variances (Yin et al., "Dreaming to Distill", 2020, equation 4).
        """
        return torch.stack(self._terms).sum()


def check_batch_norm(space: SearchSpace, batch_norm: float) -> None:
    """Raises where a prior on images is asked for and points are no images.

    Raises:
        ArgumentError: as said.
    """
    if space.name == "input" and len(space.shape) == 3:
        return
    if batch_norm:
        raise ArgumentError(
            "batch_norm",
            f"got {batch_norm!r} for points of shape {space.shape} in the space {space.name!r}",
            "Leave it at 0: it needs images.",
        )


def with_statistics(space: SearchSpace) -> SearchSpace:
    """``space`` with a copy of the model whose BatchNorm layers are not folded away."""
    model = copy.deepcopy(space.exact).requires_grad_(False)
    return replace(
        space, fast_model=InferenceCopy(BatchNormStatistics(model), False, torch.float32, False)
    )

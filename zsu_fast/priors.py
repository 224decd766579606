"""Priors: what an image is asked for beside its class's logit, so that it looks less like noise.

All are off by default: `benchmarks/results/priors.md` has what each of them gave.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import ArgumentError
from .fast_copy import FastCopy
from .spaces import Space


def total_variation(x: Tensor) -> Tensor:
    """Anisotropic total variation of each image: sum of ``|difference|`` of neighbours, [N].

    Args:
        x: float [N, C, H, W].
    """
    return sum((x.diff(dim=d).abs().flatten(1).sum(1) for d in (2, 3)), x.new_zeros(len(x)))


def total_variation_gradient(x: Tensor) -> Tensor:
    """The (sub)gradient of `total_variation`, in the shape and layout of ``x``."""
    gradient = torch.zeros_like(x)
    for dim in (2, 3):
        sign = x.diff(dim=dim).sign()
        gradient.narrow(dim, 1, sign.shape[dim]).add_(sign)
        gradient.narrow(dim, 0, sign.shape[dim]).sub_(sign)
    return gradient


class Observed(nn.Module):
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


def check(space: Space, total_variation: float, batch_norm: float) -> None:
    """Raises where a prior on images is asked for and points are no images.

    Raises:
        ArgumentError: as said.
    """
    if space.name == "input" and len(space.shape) == 3:
        return
    for name, weight in (("total_variation", total_variation), ("batch_norm", batch_norm)):
        if weight:
            raise ArgumentError(
                name,
                f"got {weight!r} for points of shape {space.shape} in the space {space.name!r}",
                "Leave it at 0: it needs images.",
            )


def with_statistics(space: Space) -> Space:
    """``space`` with a copy of the model whose BatchNorm layers are not folded away."""
    model = copy.deepcopy(space.exact).requires_grad_(False)
    return replace(space, climbed=FastCopy(Observed(model), False, torch.float32, False))

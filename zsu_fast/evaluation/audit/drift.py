"""How far weights and features moved from the original's, layer by layer. No data needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .audited_model import AuditedModel


@dataclass
class LayerDrift:
    """One layer of one subject against the same layer of the original.

    Attributes:
        layer: the module's name.
        weights: ||W' - W|| / ||W|| over the layer's own parameters (Frobenius), 0 for no change;
            None where the original has no such layer.
        features_forget, features_retain: `feature_drift` of the layer's input on impressions of
            the forgotten and of the other classes; None where that was not observed.
    """

    layer: str
    weights: float | None
    features_forget: float | None = None
    features_retain: float | None = None


def weight_drift(subject: AuditedModel, original: AuditedModel, layer: str) -> float | None:
    """||W' - W|| / ||W|| of a layer's parameters; None where the shapes differ."""
    named = dict(subject.model.module.named_modules())
    other = dict(original.model.module.named_modules())
    if layer not in named or layer not in other:
        return None
    new = {n: p.detach() for n, p in named[layer].named_parameters()}
    old = {n: p.detach() for n, p in other[layer].named_parameters()}
    if {n: p.shape for n, p in new.items()} != {n: p.shape for n, p in old.items()}:
        return None
    return relative(
        torch.cat([new[n].flatten().double() for n in old]),
        torch.cat([old[n].flatten().double() for n in old]),
    )


def relative(new: Tensor, old: Tensor) -> float:
    """||new - old|| / ||old||."""
    return float((new - old).norm() / old.norm().clamp(min=1e-30))


def feature_drift(new: Tensor, old: Tensor) -> float | None:
    """Mean squared distance of features over the original's variance, both [N, D]; None if none.

    0: the same features. About 2: as far apart as two images of unrelated content.
    """
    if new.shape != old.shape or not len(old):
        return None
    spread = (old - old.mean(0)).square().sum()
    return float((new - old).square().sum() / spread.clamp(min=1e-30))

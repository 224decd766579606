"""How far weights and features moved from the original's, layer by layer. Needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from .audited_model import AuditedModel


def layer_drift(audited: AuditedModel, original: AuditedModel, layer: str) -> float | None:
    """||W' - W|| / ||W|| of a layer's parameters; None if a model lacks it or shapes differ."""
    parameters = []
    for model in (audited, original):
        modules = dict(model.model.module.named_modules())
        if layer not in modules:
            return None
        parameters.append({n: p.detach() for n, p in modules[layer].named_parameters()})
    return parameter_drift(*parameters)


def backbone_drift(audited: AuditedModel, original: AuditedModel) -> float | None:
    """||W' - W|| / ||W|| of all parameters before the last layer; None if shapes differ."""
    if audited.backbone_hash == original.backbone_hash:
        return 0.0
    parameters = []
    for model in (audited, original):
        last = f"{model.layers[-1]}."
        named = model.model.module.named_parameters()
        parameters.append({n: p.detach() for n, p in named if not n.startswith(last)})
    return parameter_drift(*parameters)


def parameter_drift(new: dict[str, Tensor], old: dict[str, Tensor]) -> float | None:
    """||new - old|| / ||old|| over all tensors, in float64; None if names or shapes differ."""
    if {n: p.shape for n, p in new.items()} != {n: p.shape for n, p in old.items()}:
        return None
    return relative_change(
        *(torch.cat([values[n].flatten().double() for n in old]) for values in (new, old))
    )


def relative_change(new: Tensor, old: Tensor) -> float:
    """||new - old|| / ||old||."""
    return float((new - old).norm() / old.norm().clamp(min=1e-30))


def feature_drift(new: Tensor, old: Tensor) -> float | None:
    """Mean squared distance of features, both [N, D], over the original's variance.

    0: the same features. About 2: as far apart as two unrelated images. None: the shapes differ or
    there are no rows.
    """
    if new.shape != old.shape or not len(old):
        return None
    variance = (old - old.mean(0)).square().sum()
    return float((new - old).square().sum() / variance.clamp(min=1e-30))

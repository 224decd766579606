"""Measures of weights: how far they moved, and how the last layer was changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .audited_model import AuditedModel

# Rows closer than this (relative) count as the same, and this cosine as the same direction.
_SAME, _SAME_DIRECTION = 1e-3, 0.999
# A change is noise if its aligned share exceeds chance by less than this.
_ALIGNED = 0.2
# Damping of the covariance in `erasure_cost`, relative to the mean variance.
_DAMPING = 0.3

Change = Literal["same", "masked", "shuffled", "noise", "trained", "unknown"]


@dataclass(frozen=True)
class LastLayer:
    """The last layer compared with the original's.

    Attributes:
        change: "same"; "masked" (rows of forgotten classes were emptied, biases changed, or a mask
            hides the logits); "shuffled" (rows are those of other classes); "noise" (the change
            has no direction); "trained"; or "unknown" (not one row per class, or other shapes).
        says: the observation, in words.
    """

    change: Change
    says: str


def layer_drift(audited: AuditedModel, original: AuditedModel, layer: str) -> float | None:
    """||W' - W|| / ||W|| of a layer's parameters; None if a model lacks it or shapes differ."""
    found = (
        dict(m.model.module.named_modules()).get(layer, nn.Identity()) for m in (audited, original)
    )
    return parameter_drift(*(dict(module.named_parameters()) for module in found))


def backbone_drift(audited: AuditedModel, original: AuditedModel) -> float | None:
    """||W' - W|| / ||W|| of all parameters before the last layer; None if shapes differ."""
    if audited.backbone_hash == original.backbone_hash:
        return 0.0
    return parameter_drift(*(
        {n: p for n, p in m.model.module.named_parameters() if not m.is_in_last_layer(n)}
        for m in (audited, original)
    ))  # fmt: skip


def parameter_drift(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> float | None:
    """||new - old|| / ||old|| over all tensors, in float64; None if names or shapes differ."""
    if {n: p.shape for n, p in new.items()} != {n: p.shape for n, p in old.items()}:
        return None
    return relative_change(
        *(torch.cat([part[n].detach().flatten().double() for n in old]) for part in (new, old))
    )


def relative_change(new: Tensor, old: Tensor) -> float:
    """||new - old|| / ||old||."""
    return float((new - old).norm() / old.norm().clamp(min=1e-30))


def erasure_cost(weight: Tensor, forget: Tensor, features: Tensor | None) -> float:
    """Share of the retained logits' energy that a linear erasure of the forgotten classes removes.

    The erasure projects the features onto the complement of what the forgotten logits read. It
    takes ``||W_r P||^2 / ||W_r||^2`` from the retained logits, where

    - ``W_r`` and ``W_f`` are the last layer's rows of retained and of forgotten classes minus the
      mean over all classes, in coordinates in which the features are white: times ``L``, with
      ``L L^T`` the covariance of ``features`` plus 0.3 times their mean variance;
    - ``P`` is the orthogonal projector on the row space of ``W_f``.

    In other words: the share of the retained logits' variance that is linear in the forgotten
    logits. It is not a share of RA, and training layers before the last one may cost less.

    Args:
        weight: float [C, D], the last layer's weights, one row per class.
        forget: bool [C], True for forgotten classes.
        features: float [N, D], inputs of the last layer. None: no whitening.

    Returns:
        0 (nothing is lost) to 1 (all is lost, as with as many forgotten classes as features).
    """
    rows = weight.double()
    rows = rows - rows.mean(0)
    if features is not None:
        centred = features.double() - features.mean(0, dtype=torch.float64)
        covariance = centred.T @ centred / len(centred)
        damping = _DAMPING * float(covariance.diagonal().mean())
        covariance.diagonal().add_(max(damping, 1e-30))
        rows = rows @ torch.linalg.cholesky(covariance)
    _, sizes, axes = torch.linalg.svd(rows[forget], full_matrices=False)
    retained, axes = rows[~forget], axes[sizes > 1e-6 * sizes[0]]
    energy = retained.square().sum().clamp(min=1e-30)
    return float((retained @ axes.T).square().sum() / energy)


def compare_last_layers(
    new: Tensor | None, old: Tensor | None, forget: list[int], hidden: bool, features: Tensor
) -> LastLayer:
    """Compares the rows (weights and bias) of two last layers.

    Training changes rows along the features that it saw; noise points anywhere. The *aligned
    share* is the part of ||W' - W||^2 in the span of the original's rows and of the classes' mean
    features. After training it measured 0.75 to 0.83; noise has k / D, the dimension of that span
    over that of the space.

    Args:
        new, old: [C, D] or, with biases last, [C, D + 1]; None if there are none.
        forget: the forgotten classes.
        hidden: whether a mask hides the logits.
        features: [K, D], the original's mean features (input of the last layer) of K classes.
    """
    if new is None or old is None or new.shape != old.shape:
        return LastLayer("unknown", "the last layers can't be compared row by row")
    moved = (new - old).norm(dim=1) / old.norm(dim=1).clamp(min=1e-12)
    if bool((moved <= _SAME).all()):
        if hidden:
            return LastLayer("masked", "a mask sets the logits of the forgotten classes to -inf")
        return LastLayer("same", "the last layer is the original's")
    swaps = _swaps(new, old, moved)
    if swaps:
        examples = ", ".join(f"class {a} has the row of class {b}" for a, b in swaps[:4])
        says = f"{len(swaps)} classes have another class's row in the last layer ({examples})"
        return LastLayer("shuffled", says)
    width = features.shape[1]
    if torch.equal(new[:, :width], old[:, :width]):
        return LastLayer("masked", "only biases of the last layer were changed")
    aligned, chance = _aligned_share(new - old, old, features)
    noise = None
    if aligned is not None and aligned < chance + _ALIGNED:
        along = f"{100 * aligned:.0f} % of the change lies along features"
        noise = f"{along}, {100 * chance:.0f} % by chance"
    forget_mask = torch.zeros(len(old), dtype=torch.bool)
    forget_mask[forget] = True
    if not bool((moved[~forget_mask] > _SAME).any()):
        rows = new[forget_mask], old[forget_mask]
        return _compare_forgotten_rows(*rows, width, noise, aligned is not None)
    if noise is not None:
        return LastLayer("noise", f"random numbers were added to the last layer ({noise})")
    return LastLayer("trained", "only the last layer was changed")


def _compare_forgotten_rows(
    new: Tensor, old: Tensor, width: int, noise: str | None, has_aligned_share: bool
) -> LastLayer:
    """Compares the rows of the forgotten classes if no other row changed.

    Args:
        new, old: these rows, with ``width`` weights each.
        noise: the numbers in words if the change has no direction, else None.
        has_aligned_share: whether the direction of the change is known.
    """
    several = bool(((new != old).sum(1) > 1).all())  # a mask by the bias alone changes one number
    if noise is not None and several:
        says = "random numbers were added to the last layer's rows of the forgotten classes"
        return LastLayer("noise", f"{says} ({noise})")
    emptied = bool(new[:, :width].norm() <= _SAME * old.norm())
    if emptied or not several or not has_aligned_share:
        return LastLayer(
            "masked",
            "the last layer's rows of the forgotten classes were overwritten, and all other rows "
            "are the original's",
        )
    says = "only the last layer was changed, and in it only the rows of the forgotten classes"
    return LastLayer("trained", says)


def _swaps(new: Tensor, old: Tensor, moved: Tensor) -> list[tuple[int, int]]:
    """Returns (class, other class) for each row that is the other class's in the original."""
    units = [t / t.norm(dim=1, keepdim=True).clamp(min=1e-12) for t in (new, old)]
    cosine = units[0] @ units[1].T
    swaps = []
    for c in (moved > 0.1).nonzero()[:, 0].tolist():
        best = int(cosine[c].argmax())
        distance = float((new[c] - old[best]).norm() / old[best].norm().clamp(min=1e-12))
        if best != c and float(cosine[c, best]) > _SAME_DIRECTION and distance < 0.05:
            swaps.append((c, best))
    return swaps


def _aligned_share(change: Tensor, old: Tensor, features: Tensor) -> tuple[float | None, float]:
    """Returns the aligned share of ``change`` (without biases) and its value by chance."""
    width = features.shape[1]
    if old.shape[1] - width not in (0, 1):
        return None, 1.0
    weights = change[:, :width].double()
    span = torch.cat([old[:, :width].double(), features.double()])
    _, sizes, axes = torch.linalg.svd(span, full_matrices=False)
    rank = int((sizes > 1e-6 * float(sizes[0])).sum())
    energy = (weights @ axes[:rank].T).square().sum() / weights.square().sum().clamp(min=1e-30)
    chance = rank / span.shape[1]
    return (float(energy), chance) if chance <= 0.6 else (None, chance)

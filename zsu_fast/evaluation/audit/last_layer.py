"""What was done to the last layer: nothing, a mask, a shuffle, noise, or training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows closer than this (relative) count as the same, and this cosine as the same direction.
_SAME, _ALIKE = 1e-3, 0.999
# A change of which less than this share, beyond what chance gives, lies where features lie.
_ALIGNED = 0.2


@dataclass(frozen=True)
class LastLayer:
    """The last layer against the original's.

    Attributes:
        kind: "same", "masked" (rows of forgotten classes were emptied or their biases lowered,
            or a mask lies on them),
            "shuffled" (rows are those of other classes), "noise" (the change has no direction),
            "trained", or "unknown" (no row a class, or other shapes).
        says: what was seen, in words.
    """

    kind: str
    says: str


def examine(
    new: Tensor | None, old: Tensor | None, forget: list[int], hidden: bool, features: Tensor
) -> LastLayer:
    """Compares the rows (weights and bias) of two last layers.

    What training changes lies along the features that it saw; noise lies anywhere. The *aligned
    share* is the part of ||W' - W||^2 in the span of the original's rows and of the classes' mean
    features: 0.75 to 0.83 was measured after training, and k / D, the dimension of that span over
    that of the space, is what noise has.

    Args:
        new, old: [C, D] or, with biases last, [C, D + 1] from `unmask.rows_of`; None where there
            are none.
        forget: the forgotten classes.
        hidden: whether a mask lies on the logits.
        features: [C, D] the original's mean features (input of the last layer) of some classes.
    """
    if new is None or old is None or new.shape != old.shape:
        return LastLayer("unknown", "the last layers can't be compared row by row")
    gone = torch.zeros(len(old), dtype=torch.bool)
    gone[forget] = True
    scale = old.norm(dim=1).clamp(min=1e-12)
    moved = (new - old).norm(dim=1) / scale
    if bool((moved <= _SAME).all()):
        if hidden:
            return LastLayer("masked", "a mask sets the logits of the forgotten classes to -inf")
        return LastLayer("same", "the last layer is the original's")
    swaps = _swaps(new, old, moved)
    if swaps:
        some = ", ".join(f"{a} has that of {b}" for a, b in swaps[:4])
        return LastLayer(
            "shuffled", f"{len(swaps)} classes have another class's row in the last layer ({some})"
        )
    if torch.equal(new[:, : features.shape[1]], old[:, : features.shape[1]]):
        return LastLayer("masked", "only biases of the last layer were changed")
    aligned, chance = _aligned(new - old, old, features)
    if not bool((moved[~gone] > _SAME).any()):
        if aligned is not None and aligned < chance + _ALIGNED and _weights_moved(new, old, gone):
            return LastLayer(
                "noise",
                f"random numbers were added to the last layer's rows of the forgotten classes "
                f"({100 * aligned:.0f} % of the change lies along features, {100 * chance:.0f} % "
                f"by chance)",
            )
        emptied = new[gone, : features.shape[1]].norm() <= _SAME * old[gone].norm()
        if aligned is None or bool(emptied) or not _weights_moved(new, old, gone):
            return LastLayer(
                "masked",
                "the last layer's rows of the forgotten classes were overwritten, all other rows "
                "are the original's",
            )
        return LastLayer(
            "trained",
            "only the last layer was changed, and there only the rows of the forgotten classes",
        )
    if aligned is not None and aligned < chance + _ALIGNED:
        return LastLayer(
            "noise",
            f"random numbers were added to the last layer ({100 * aligned:.0f} % of the change "
            f"lies along features, {100 * chance:.0f} % by chance)",
        )
    return LastLayer("trained", "only the last layer was changed")


def _swaps(new: Tensor, old: Tensor, moved: Tensor) -> list[tuple[int, int]]:
    """(class, whose row it has) for rows that are another class's in the original."""
    units = [t / t.norm(dim=1, keepdim=True).clamp(min=1e-12) for t in (new, old)]
    cosine = units[0] @ units[1].T
    swaps = []
    for c in (moved > 0.1).nonzero()[:, 0].tolist():
        best = int(cosine[c].argmax())
        near = float((new[c] - old[best]).norm() / old[best].norm().clamp(min=1e-12))
        if best != c and float(cosine[c, best]) > _ALIKE and near < 0.05:
            swaps.append((c, best))
    return swaps


def _weights_moved(new: Tensor, old: Tensor, gone: Tensor) -> bool:
    """Whether more than one number a row changed: a mask by its bias alone has one."""
    return bool(((new != old)[gone].sum(1) > 1).all())


def _aligned(change: Tensor, old: Tensor, features: Tensor) -> tuple[float | None, float]:
    """The aligned share of ``change`` (without biases), and what chance gives."""
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

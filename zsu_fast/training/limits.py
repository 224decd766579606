"""How much memory training may use for what it could also compute again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryLimits:
    """Sizes above which features and logits are computed in parts or on demand.

    Attributes:
        feature_bytes: largest mixed feature set that is stored; the rows of a larger one are mixed
            when they are selected.
        teacher_bytes: largest set of teacher logits that is stored; beyond it, the original tail
            computes the logits of the selected rows.
        chunk_bytes: features sent through the tail at once where no gradient is needed.
        tile_logits: logits, rows times classes, held at once where not all of them are stored.
        tile_classes: classes computed at once by `class_subset.tiles`.
        subset_above: with more classes than this, only the forgotten logits are computed if only
            they are trained.
    """

    feature_bytes: int = 128 * 1024**2
    teacher_bytes: int = 512 * 1024**2
    chunk_bytes: int = 32 * 1024**2
    tile_logits: int = 8 * 1024**2
    tile_classes: int = 8192
    subset_above: int = 256

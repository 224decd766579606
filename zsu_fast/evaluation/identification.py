"""Measures of identification: how images match the templates of a gallery.

Pure functions of similarities. An image is *identified* as the identity with the greatest
similarity, if that is above the acceptance threshold. The threshold is set on impostor pairs of the
retained identities, for a false-accept rate (FAR), as in NIST's FRVT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The false-accept rates that are reported.
FARS = (1e-2, 1e-3)
# Images and similarities per chunk, and the most impostor similarities that are kept: of more,
# those with a random subset of the identities.
_CHUNK, _CHUNK_VALUES, _MAX_IMPOSTORS = 512, 1 << 24, 1 << 24
# Bins of a distribution.
_BINS = 40


@dataclass(frozen=True)
class Matches:
    """How N images of enrolled identities match the gallery.

    Attributes:
        labels: int64 [N], the identity of each image.
        forget: bool [C], True for the forgotten identities.
        best: int64 [N], the identity with the greatest similarity, and `best_similarity` [N].
        own: float32 [N], the similarity with the image's own identity.
        other: int64 [N], the most similar *retained* identity except the image's own, and
            `other_similarity` [N]; -1 and -inf if there is none.
        impostors: float32 [M], similarities of images of retained identities with other retained
            ones.
    """

    labels: Tensor
    forget: Tensor
    best: Tensor
    best_similarity: Tensor
    own: Tensor
    other: Tensor
    other_similarity: Tensor
    impostors: Tensor

    @property
    def forgotten(self) -> Tensor:
        """Whether each image is of a forgotten identity, bool [N]."""
        return self.forget[self.labels]

    def threshold(self, far: float) -> float | None:
        """The similarity above which at most a share ``far`` of impostor pairs lies.

        None if there are fewer than ``1 / far`` impostor pairs, too few to tell.
        """
        allowed = int(far * len(self.impostors) + 1e-9)
        if allowed < 1:
            return None
        return float(self.impostors.sort(descending=True).values[allowed])

    def rank1(self, rows: Tensor, above: float = -float("inf")) -> float | None:
        """Per cent of the images in ``rows``, bool [N], that are identified as their own identity.

        Args:
            rows: the images to count.
            above: the acceptance threshold; -inf for closed-set identification.
        """
        return _percent((self.best == self.labels) & (self.best_similarity > above), rows)

    def true_accepts(self, rows: Tensor, above: float) -> float | None:
        """TAR: per cent of ``rows`` whose similarity with their own identity is above this."""
        return _percent(self.own > above, rows)

    def accepted_as_another(self, rows: Tensor, above: float) -> float | None:
        """Per cent of ``rows`` that a retained identity other than their own attracts.

        For images of retained identities, that is the rate for strangers: what happens to them if
        their own templates are not in the gallery.
        """
        return _percent(self.other_similarity > above, rows)

    def attraction(self, above: float) -> Tensor:
        """Which retained identity attracts the images of forgotten ones: share [C] of them all.

        An image is attracted by the most similar retained identity, if above the threshold.
        """
        rows = self.forgotten & (self.other_similarity > above)
        count = torch.bincount(self.other[rows], minlength=len(self.forget))
        return count.double() / max(1, int(self.forgotten.sum()))

    def attraction_ratio(self, above: float) -> float | None:
        """The greatest `attraction` over an equal share, 1 / retained identities, or None."""
        retained = int((~self.forget).sum())
        if not bool(self.forgotten.any()) or not retained:
            return None
        return float(self.attraction(above).max()) * retained


@torch.no_grad()
def match(
    embeddings: Tensor,
    labels: Tensor,
    similarities: Callable[[Tensor], Tensor],
    forget: Tensor,
    seed: int = 0,
) -> Matches:
    """Compares embeddings with all templates, in chunks.

    Args:
        embeddings: float [N, D].
        labels: int64 [N], in 0..C-1.
        similarities: embeddings [n, D] -> similarities [n, C], one per identity.
        forget: bool [C], True for the forgotten identities.
        seed: of the subset of identities whose impostor similarities are kept.
    """
    generator = torch.Generator().manual_seed(seed)
    most = max(1, _MAX_IMPOSTORS // max(1, len(labels)))
    columns = (~forget).nonzero()[:, 0]
    if len(columns) > most:
        columns = columns[torch.randperm(len(columns), generator=generator)[:most]].sort().values
    found: list[tuple[Tensor, ...]] = []
    impostors: list[Tensor] = []
    chunk = max(1, min(_CHUNK, _CHUNK_VALUES // len(forget)))
    for part, own in zip(embeddings.split(chunk), labels.split(chunk), strict=True):
        table = similarities(part).float().cpu()
        rows = torch.arange(len(table))
        best_similarity, best = table.max(1)
        others = table.masked_fill(forget, -torch.inf)
        others[rows, own] = -torch.inf
        other_similarity, other = others.max(1)
        other = other.masked_fill(other_similarity == -torch.inf, -1)
        found.append((best, best_similarity, table[rows, own], other, other_similarity))
        of_retained = ~forget[own]
        kept = others[of_retained][:, columns]
        impostors.append(kept[kept > -torch.inf])
    best, best_similarity, mine, other, other_similarity = map(torch.cat, zip(*found, strict=True))
    return Matches(
        labels, forget, best, best_similarity, mine, other, other_similarity, torch.cat(impostors)
    )


def distributions(matches: list[Matches]) -> list[dict[str, list[tuple[float, float]]]]:
    """Histograms of similarities, with the same bins for each of ``matches``.

    Returns, for each: the kind of pair -> (middle of the bin, per cent of the pairs). The kinds are
    "forgotten, own" and "retained, own" (an image and its own identity), "forgotten, other" (an
    image of a forgotten identity and the most similar retained one), and "retained, other" (images
    and other identities: impostor pairs).
    """
    groups = [_groups(m) for m in matches]
    values = [v for group in groups for v in group.values() if len(v)]
    if not values:
        return [{} for _ in matches]
    low = min(float(v.min()) for v in values)
    high = max(float(v.max()) for v in values)
    high = high if high > low else low + 1
    width = (high - low) / _BINS
    middles = [low + (i + 0.5) * width for i in range(_BINS)]

    def histogram(group: Tensor) -> list[tuple[float, float]]:
        share = 100 * torch.histc(group, _BINS, low, high) / len(group)
        return list(zip(middles, share.tolist(), strict=True))

    return [{k: histogram(v) for k, v in group.items() if len(v)} for group in groups]


def _groups(m: Matches) -> dict[str, Tensor]:
    nearest = m.other_similarity[m.forgotten]
    return {
        "forgotten, own": m.own[m.forgotten],
        "forgotten, other": nearest[nearest.isfinite()],
        "retained, own": m.own[~m.forgotten],
        "retained, other": m.impostors,
    }


def _percent(values: Tensor, rows: Tensor) -> float | None:
    total = int(rows.sum())
    return 100 * int((values & rows).sum()) / total if total else None

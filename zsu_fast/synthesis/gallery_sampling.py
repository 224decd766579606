"""The part of a gallery that a run computes with: whom to forget, and some of those who stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ArgumentError, check_int, shorten
from ..models.embedding_classifier import EmbeddingClassifier, SimilarityLayer, check_vectors
from .class_sampling import ALL, TILE_VALUES, sample_classes, sample_size
from .impressions import ClassImpressions

NEAREST = "the forgotten, half of the sample nearest to them by their templates, half at random"
_SAME = 1e-6  # templates whose cosine and whose norms differ by less belong to one person


@dataclass(frozen=True)
class WorkingGallery:
    """A classifier of the identities to forget and of those that are to stay as they are.

    Attributes:
        classifier: the encoder as it was passed, and the templates of ``identities``.
        identities: the user's number of each, ascending; templates that are in no gallery are
            numbered on from its last identity.
        forget: the user's numbers of the identities to forget now.
        all_forgotten: those numbers, and those of identities forgotten before.
        classes: identities of the user's gallery, and templates that are in none.
        outside: the number of the latter.
        rule: which identities stay, in words.
    """

    classifier: EmbeddingClassifier
    identities: tuple[int, ...]
    forget: list[int]
    all_forgotten: list[int]
    classes: int
    outside: int
    rule: str

    @classmethod
    def choose(
        cls,
        classifier: EmbeddingClassifier,
        forget: Sequence[int],
        forgotten: Sequence[int],
        templates: Tensor | None,
        retain_sample: int | None,
        seed: int,
    ) -> WorkingGallery:
        """Chooses the identities.

        Args:
            classifier: the user's; it is not changed, and its encoder is not copied.
            forget, forgotten: identities of its gallery.
            templates: float [k, D] to forget that are in no gallery, from `as_templates`; or None.
            retain_sample: how many other identities take part, see `sample_size`.
            seed: of the random part of the sample.

        Raises:
            ArgumentError: ``retain_sample`` is no positive integer, or one that is to stay has the
                template of one to forget.
        """
        check_int("retain_sample", retain_sample, optional=True)
        gallery, count = classifier.gallery, len(classifier.gallery)
        rows = templates if templates is not None else gallery.templates[:0]
        all_forgotten = [*forget, *forgotten]
        retained = sorted({*range(count)} - {*all_forgotten})
        whole = SimilarityLayer(
            torch.cat([gallery.templates, rows]),
            torch.cat([gallery.identity, count + torch.arange(len(rows), device=rows.device)]),
            gallery.metric, gallery.scale, gallery.bias,
        )  # fmt: skip
        if gallery.bias is not None:
            whole.bias = torch.cat([gallery.bias, gallery.bias.mean().expand(len(rows))])
        forget = [*forget, *range(count, count + len(rows))]
        _check_apart(whole, forget, retained, classifier.class_names)
        size = sample_size(len(retained), retain_sample)
        chosen, rule = sorted([*forget, *retained]), ALL
        if size < len(retained):
            chosen = sample_classes(_means(whole), forget, retained, size, seed)
            rule = NEAREST
        identities = sorted({*chosen, *forgotten})
        working = EmbeddingClassifier.of_gallery(classifier, whole.part(identities))
        all_forgotten = sorted({*forget, *forgotten})
        return cls(
            working, tuple(identities), forget, all_forgotten, count + len(rows), len(rows), rule
        )

    @property
    def forget_mask(self) -> Tensor:
        """bool [number of identities]."""
        return torch.tensor([c in {*self.all_forgotten} for c in self.identities])

    @property
    def active(self) -> list[int]:
        """The places of the identities that get rows: all but those forgotten before."""
        before = {*self.all_forgotten} - {*self.forget}
        return [place for place, c in enumerate(self.identities) if c not in before]

    def templates_to_forget(self) -> list[Tensor]:
        """The templates float [k, D] of each identity in ``forget``."""
        gallery = self.classifier.gallery
        places = [self.identities.index(c) for c in self.forget]
        return [gallery.templates[gallery.identity == place] for place in places]

    def facts(self) -> dict[str, Any]:
        """For the record, see `Record`."""
        gallery = self.classifier.gallery
        return {
            "identities": self.classes - self.outside,
            "templates": self.outside,
            "metric": gallery.metric,
            "scale": gallery.scale,
        }

    def as_users(self, impressions: ClassImpressions) -> ClassImpressions:
        """Impressions whose labels are places, with the user's numbers instead."""
        return replace(impressions, labels=torch.tensor(self.identities)[impressions.labels])

    def places(self, labels: Tensor) -> Tensor:
        """The reverse: the user's numbers, int64 [N], as places."""
        return torch.searchsorted(torch.tensor(self.identities), labels.cpu())


def as_templates(forget: Any, width: int) -> Tensor | None:
    """``forget`` as templates, float32 [k, D], if it is a float tensor or array; else None.

    Raises:
        ArgumentError: its width is another, or a template is not finite, or 0.
    """
    if isinstance(forget, np.ndarray) and forget.dtype.kind == "f":
        forget = torch.from_numpy(forget)
    if not isinstance(forget, Tensor) or not forget.is_floating_point():
        return None
    rows = forget.detach().float().cpu()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != width:
        raise ArgumentError(
            "forget", f"got templates of shape {list(forget.shape)}",
            f"Pass [k, {width}], as wide as those of the gallery, or identities of it.",
        )  # fmt: skip
    check_vectors("forget", rows, torch.arange(len(rows)))
    return rows.clone()


def _means(gallery: SimilarityLayer) -> Tensor:
    """The mean template of each identity, [C, D]."""
    total = gallery.templates.new_zeros(len(gallery), gallery.templates.shape[1])
    total.index_add_(0, gallery.identity, gallery.templates)
    return total / torch.bincount(gallery.identity)[:, None]


def _check_apart(
    gallery: SimilarityLayer,
    forget: Sequence[int],
    retained: Sequence[int],
    names: Sequence[str] | None,
) -> None:
    """Raises if a template is of one to forget and of one to stay."""
    stays = torch.isin(
        gallery.identity, torch.tensor(list(retained), device=gallery.identity.device)
    )
    others = gallery.identity[stays]
    rows, norms = F.normalize(gallery.templates[stays]), gallery.templates[stays].norm(dim=1)
    leaves = torch.isin(
        gallery.identity, torch.tensor(list(forget), device=gallery.identity.device)
    )
    own, templates = gallery.identity[leaves], gallery.templates[leaves]
    tile = max(1, TILE_VALUES // max(1, len(rows)))
    for part, numbers in zip(templates.split(tile), own.split(tile), strict=True):
        same = F.normalize(part) @ rows.T > 1 - _SAME
        if gallery.metric != "cosine":
            size = part.norm(dim=1)[:, None]
            same &= (norms - size).abs() < _SAME * size
        if bool(same.any()):
            first, second = (int(i[0]) for i in same.nonzero(as_tuple=True))
            pair = [int(numbers[first]), int(others[second])]
            named = [repr(names[c]) if names and c < len(names) else str(c) for c in pair]
            raise ArgumentError(
                "forget", f"identity {named[0]} has the same template as {named[1]}, which stays",
                f"One of them can't be forgotten without the other: name {shorten(named)}.",
            )  # fmt: skip

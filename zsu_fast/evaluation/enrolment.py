"""Enrolment: from labelled images to the templates of a gallery."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, ModelError, UnlearningWarning, check_choice, check_int, shorten
from ..models.embedding_classifier import METRICS, Metric
from ..models.gallery import Gallery
from ..models.parameters import weights_hash
from .data_classes import classes_of
from .embed import embed
from .labelled_data import LabelledData
from .run_model import eval_mode, image_spec

# Two identities with more similar templates (cosine) are probably one.
_ALIKE = 0.9999
_MOST_COMPARED = 4096  # identities


def enroll(
    encoder: nn.Module,
    data: Any,
    *,
    images_per_identity: int | None = None,
    every_image: bool = False,
    metric: Metric = "cosine",
    scale: float | None = None,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    batch: int = 64,
) -> Gallery:
    """Computes the templates of the identities in labelled images.

    Args:
        encoder: images -> embeddings, see `EmbeddingClassifier`; runs in eval mode and returns to
            its modes afterwards.
        data: labelled images as for `evaluate`, one class per identity; names of folders, or of the
            data set's classes, or labels that are texts, become names. Labels that are numbers, of
            data without names, become names as they are. Identities are numbered in the order of
            the folders or classes, or else of the sorted labels.
        images_per_identity: use the first of each identity, at most this many; None: all.
        every_image: whether each image gives a template; otherwise their mean is the template of
            the identity (with metric="cosine", of embeddings of length 1).
        metric, scale: stored in the gallery.
        input_shape, mean, std: the images that the encoder takes; None: what it states.
        batch: the batch size if ``data`` is a pair or has rows.

    Raises:
        ArgumentError: there are no images, or none of an identity that the data names.
        ModelError: the encoder does not return one vector per image, or one that is NaN or 0.

    Warns:
        UnlearningWarning: an identity has fewer images than asked for, or two identities have the
            same template.
    """
    check_int("images_per_identity", images_per_identity, 1, optional=True)
    check_choice("metric", metric, METRICS)
    source = LabelledData(data, "data", image_spec(encoder, input_shape, mean, std))
    found = _collect(encoder, source, images_per_identity, batch)
    stated = classes_of(data)
    names = _sorted(found) if stated is None else stated[0]
    if without := [name for name in names if not found.get(name)]:
        raise ArgumentError(
            "data", f"there is no image of {shorten(map(repr, without))}",
            "Add one to each folder, or remove the folder.",
        )  # fmt: skip
    vectors = {name: torch.stack(found[name]) for name in names}
    for name, rows in vectors.items():
        if zero := int((rows == 0).all(1).sum()):
            raise ModelError(
                f"its embeddings of {zero} of {len(rows)} images of {name!r} are 0",
                "Check the weights, the images, and how they are normalised.",
            )
    if images_per_identity is not None:
        few = [n for n, rows in vectors.items() if len(rows) < images_per_identity]
        if few:
            _warn(f"fewer than {images_per_identity} images of {shorten(map(repr, few))}")
    facts, doubts = source.format.assumptions()
    for note in [*facts, *doubts]:
        warnings.warn(note, UnlearningWarning, stacklevel=2)
    gallery = _gallery(vectors, every_image, metric, scale, weights_hash(encoder))
    _warn_of_doubles(gallery)
    return gallery


def enroll_embeddings(
    embeddings: Tensor, labels: Tensor, classes: int, metric: Metric, per_identity: int
) -> Tensor | None:
    """The mean templates, float32 [C, D], of embeddings [N, D] with labels int64 [N].

    Uses the first ``per_identity`` of each identity; None if an identity has no embedding, or only
    embeddings whose mean is 0.
    """
    templates = []
    for c in range(classes):
        rows = embeddings[labels == c][:per_identity]
        if not len(rows):
            return None
        templates.append(_mean(rows, metric))
    found = torch.stack(templates)
    return found if bool(found.any(1).all()) else None


def _collect(
    encoder: nn.Module, source: LabelledData, limit: int | None, batch: int
) -> dict[str, list[Tensor]]:
    """Name -> embeddings, in the order of the images; only images that count are computed."""
    stated = classes_of(source.data)
    found: dict[str, list[Tensor]] = {}
    counts: Counter[str] = Counter()
    with eval_mode(encoder):
        for images, labels in source.batches(batch):
            chosen = []
            for index, name in enumerate(_names(labels, None if stated is None else stated[0])):
                if limit is None or counts[name] < limit:
                    counts[name] += 1
                    chosen.append((index, name))
            if chosen:
                vectors = embed(encoder, images[[index for index, _ in chosen]])
                for vector, (_, name) in zip(vectors, chosen, strict=True):
                    found.setdefault(name, []).append(vector)
    return found


def _names(labels: Any, stated: list[str] | None) -> list[str]:
    values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    if not all(isinstance(v, int | str) for v in values):
        raise ArgumentError(
            "data", f"its labels are like {values[0]!r:.40}", "Pass one identity per image."
        )
    if stated is None:
        return list(map(str, values))
    if any(isinstance(v, int) and not 0 <= v < len(stated) for v in values):
        raise ArgumentError(
            "data", f"a label is beyond its {len(stated)} classes", "Pass labels from 0 on."
        )
    return [stated[v] if isinstance(v, int) else v for v in values]


def _sorted(names: Iterable[str]) -> list[str]:
    """Names in alphabetical order, as those of folders; numbers by their size."""
    return sorted(names, key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n))


def _gallery(
    vectors: dict[str, Tensor], every_image: bool, metric: Metric, scale: float | None, encoder: str
) -> Gallery:
    groups = {n: v if every_image else _mean(v, metric)[None] for n, v in vectors.items()}
    if zero := [name for name, rows in groups.items() if not bool(rows.any(1).all())]:
        raise ModelError(
            f"the embeddings of {shorten(map(repr, zero))} cancel each other out",
            "Pass every_image=True (--every-image), so that each image gives a template.",
        )
    counts = torch.tensor([len(rows) for rows in groups.values()])
    enrolled = {
        "images": [len(rows) for rows in vectors.values()],
        "templates": "each image" if every_image else "mean",
    }
    identity = torch.arange(len(groups)).repeat_interleave(counts)
    return Gallery(
        torch.cat(list(groups.values())), tuple(groups), identity, metric, scale, None, encoder,
        enrolled,
    )  # fmt: skip


def _mean(rows: Tensor, metric: Metric) -> Tensor:
    """The template of several embeddings, [k, D] -> [D]."""
    return (F.normalize(rows, dim=1) if metric == "cosine" else rows).mean(0)


def _warn_of_doubles(gallery: Gallery) -> None:
    """Warns if two identities have nearly the same template: one person under two names."""
    assert gallery.identity is not None
    if len(gallery.templates) > _MOST_COMPARED:
        return
    unit = F.normalize(gallery.templates, dim=1)
    alike = (unit @ unit.T > _ALIKE) & (gallery.identity[:, None] < gallery.identity)
    pairs = {(int(gallery.identity[i]), int(gallery.identity[j])) for i, j in alike.nonzero()}
    if pairs:
        named = (f"{gallery.names[a]!r} and {gallery.names[b]!r}" for a, b in sorted(pairs))
        _warn(
            f"the same template for {shorten(named, 4)}: one identity under two names? Forgetting "
            f"one while keeping the other is impossible"
        )


def _warn(text: str) -> None:
    warnings.warn(f"enroll: {text}", UnlearningWarning, stacklevel=3)

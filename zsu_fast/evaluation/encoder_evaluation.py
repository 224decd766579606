"""Accuracies of an encoder with its gallery: identification, verification, and who is accused."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, UnlearningWarning
from ..models.class_indices import check_forget
from ..models.embedding_classifier import EmbeddingClassifier, deliverable
from ..synthesis.gallery_sampling import WorkingGallery
from .class_order import check_order
from .embed import embed, scores_of
from .identification import FARS, Matches, match
from .labelled_data import LabelledData
from .run_model import eval_mode, image_spec

PARTS = ("forget", "retain")


def far_name(far: float) -> str:
    """The end of a metric's name: 1e2 for a false-accept rate of 1e-2."""
    return f"{far:.0e}".replace("e-0", "e")


def identification_rates(found: Matches) -> tuple[dict[str, float], dict[str, str]]:
    """All rates of one encoder, in per cent, and for those without a value the reason.

    ``rank1``: closed set. At each false-accept rate, with the ``threshold`` (a similarity) that the
    retained identities' impostor pairs set: ``identified`` (rank 1 and above the threshold),
    ``tar`` (true-accept rate), ``accused`` (images of forgotten identities that a retained one
    attracts), ``strangers`` (the same of images of retained identities without their own template),
    and ``attraction`` (the most that one retained identity attracts, over an equal share; no per
    cent).
    """
    rows = dict(zip(PARTS, (found.forgotten, ~found.forgotten), strict=True))
    values: dict[str, float | None] = {f"rank1_{p}": found.rank1(r) for p, r in rows.items()}
    why = dict.fromkeys(values, "the data has no image of these identities")
    for far in FARS:
        name, above = far_name(far), found.threshold(far)
        reason = (
            f"the data gives {len(found.impostors):,} impostor pairs, and a false-accept rate of "
            f"{far:.0e} needs {round(1 / far):,}"
        )
        at: dict[str, float | None] = {f"threshold_{name}": above}
        for part, own in rows.items():
            at[f"identified_{part}_{name}"] = None if above is None else found.rank1(own, above)
            at[f"tar_{part}_{name}"] = None if above is None else found.true_accepts(own, above)
        for kind, own in zip(("accused", "strangers"), rows.values(), strict=True):
            at[f"{kind}_{name}"] = None if above is None else found.accepted_as_another(own, above)
        at[f"attraction_{name}"] = None if above is None else found.attraction_ratio(above)
        values |= at
        why |= dict.fromkeys(at, reason if above is None else why["rank1_forget"])
    known = {key: value for key, value in values.items() if value is not None}
    return known, {key: why[key] for key in values if key not in known}


@dataclass(frozen=True)
class EncoderEvaluation:
    """How an encoder recognises the identities of its gallery.

    Attributes:
        rates: see `identification_rates`; those without a value are left out.
        missing: rate -> why it has no value.
        per_identity: identity -> closed-set rank-1 in per cent, for those with images.
        forget_count, retain_count: numbers of images.
        identities: in the gallery.
        forget: the forgotten identities.
        labels: identity, as text, -> name, for the forgotten ones; {} if not known.
        data_classes: class of the data -> identity, where the data names its classes.
    """

    rates: dict[str, float]
    missing: dict[str, str]
    per_identity: dict[int, float]
    forget_count: int
    retain_count: int
    identities: int
    forget: list[int]
    labels: dict[str, str] = field(default_factory=dict)
    data_classes: dict[str, int] = field(default_factory=dict)

    @property
    def forget_accuracy(self) -> float | None:
        """Closed-set rank-1 of the forgotten identities, in per cent."""
        return self.rates.get("rank1_forget")

    @property
    def retain_accuracy(self) -> float | None:
        """Closed-set rank-1 of the retained identities, in per cent."""
        return self.rates.get("rank1_retain")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def show(key: str) -> str:
            return f"{self.rates[key]:.2f} %" if key in self.rates else "unknown"

        return (
            f"rank-1 {show('rank1_forget')} of {self.forget_count} images of forgotten identities "
            f"({show('identified_forget_1e2')} above the threshold of a false-accept rate of 1 %), "
            f"{show('rank1_retain')} of {self.retain_count} others "
            f"({show('identified_retain_1e2')})"
        )


def refuse_for_encoder(output: Any, multi_label: bool | None) -> None:
    """Raises for options of classifiers that an encoder with a gallery does not have.

    Raises:
        ArgumentError: ``output`` is given, or ``multi_label`` is True.
    """
    if output is not None:
        raise ArgumentError(
            "output", f"got {output!r} for an encoder with a gallery",
            "Leave it out: EmbeddingClassifier finds the embeddings in the encoder's output.",
        )  # fmt: skip
    if multi_label:
        raise ArgumentError(
            "multi_label", "got True for an encoder with a gallery",
            "Leave it out: an image is of one identity, or of none.",
        )  # fmt: skip


def evaluate_encoder(
    classifier: EmbeddingClassifier,
    data: Any,
    forget: Any,
    batch: int = 256,
    class_names: Any = None,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> EncoderEvaluation:
    """Measures an encoder with its gallery; the arguments are those of `evaluate`.

    Raises:
        ArgumentError, ModelError: see `evaluate`.
    """
    spec = image_spec(classifier.encoder, input_shape, mean, std)
    source = LabelledData(data, "data", spec, class_names)
    classes = len(classifier.gallery)
    labels = source.match(classifier, classes)
    chosen = check_forget(forget, classes, labels)
    vectors: list[Tensor] = []
    targets: list[Tensor] = []
    with eval_mode(classifier):
        for images, given in source.batches(batch):
            vectors.append(embed(classifier, images))
            targets.append(source.targets(given, classes))
    mask = torch.zeros(classes, dtype=torch.bool)
    mask[chosen] = True
    found = match(torch.cat(vectors), torch.cat(targets), scores_of(classifier), mask)
    facts, doubts = source.format.assumptions()
    if note := check_order(found.best, found.labels, classes, chosen, source.found):
        doubts.append(f"data: {note}")
    for note in [*facts, *doubts]:
        warnings.warn(note, UnlearningWarning, stacklevel=3)
    rates, missing = identification_rates(found)
    right, total = found.best == found.labels, torch.bincount(found.labels, minlength=classes)
    correct = torch.bincount(found.labels[right], minlength=classes)
    return EncoderEvaluation(
        rates, missing,
        {c: 100 * int(correct[c]) / int(total[c]) for c in total.nonzero()[:, 0].tolist()},
        int(found.forgotten.sum()), int((~found.forgotten).sum()), classes, chosen,
        {} if labels is None else labels.named(chosen),
        {} if source.found is None else source.found.classes,
    )  # fmt: skip


def working_gallery(
    classifier: EmbeddingClassifier, unlearned: nn.Module, forget: list[int], seed: int
) -> tuple[EmbeddingClassifier, EmbeddingClassifier, list[int]]:
    """Both encoders with the original's templates, of whom to forget and of some others.

    Returns also the places of the identities to forget in that gallery.
    """
    working = WorkingGallery.choose(classifier, forget, [], None, None, seed)
    other = EmbeddingClassifier.of_gallery(classifier, working.classifier.gallery)
    other.encoder = deliverable(unlearned)
    return working.classifier, other, [working.identities.index(c) for c in forget]

"""FA and RA of multi-label classifiers: rates at the threshold, and average precision per class."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.multi_label import THRESHOLD, has_several, stated_multi_label


@dataclass(frozen=True)
class ClassScores:
    """A class of a multi-label classifier, in per cent; None where there is nothing to measure on.

    Attributes:
        average_precision: area under the precision-recall curve, as a step function. Of scores that
            say nothing, it is the share of images with the class, ``prevalence``.
        rate: images with the class in which it is predicted (recall).
        f1: harmonic mean of precision and recall of the predictions; 0 if none is right.
        prevalence: images with the class.
        count: number of images with the class.
    """

    average_precision: float | None
    rate: float | None
    f1: float | None
    prevalence: float
    count: int


@dataclass(frozen=True)
class MultiLabelEvaluation:
    """Measurements of a multi-label classifier in per cent; None where there is no image.

    A class is predicted if its probability is at least ``threshold``.

    Attributes:
        forget_rate: FA, the labels of forgotten classes that are still predicted, over all images
            that have them. Lower is better.
        forget_average_precision: mean over the forgotten classes. A mask brings it down to
            ``forget_prevalence``; above that, the scores still tell which images have the class.
        forget_prevalence: mean share of images that have a forgotten class.
        retain_average_precision: RA, mean over the retained classes. Higher is better.
        retain_rate: the same as ``forget_rate`` for the retained classes.
        retain_f1: mean F1 over the retained classes.
        per_class: class -> its scores, for each class that an image has.
        forget_count, retain_count: numbers of labels behind the rates.
        images: number of images.
        forget: the forgotten classes.
        outputs: "logits", or "probabilities" if all outputs lie in 0..1.
        threshold: a probability.
        labels, data_classes: see `Evaluation`.
    """

    forget_rate: float | None
    forget_average_precision: float | None
    forget_prevalence: float | None
    retain_average_precision: float | None
    retain_rate: float | None
    retain_f1: float | None
    per_class: dict[int, ClassScores]
    forget_count: int
    retain_count: int
    images: int
    forget: list[int]
    outputs: str
    threshold: float = THRESHOLD
    labels: dict[str, str] = field(default_factory=dict)
    data_classes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_outputs(
        cls, outputs: Tensor, labels: Tensor, forget: list[int]
    ) -> MultiLabelEvaluation:
        """Builds the measurements from outputs, float [N, C], and labels, bool [N, C]."""
        kind = "probabilities" if _in_unit_interval(outputs) else "logits"
        return cls._from(outputs, labels, forget, kind)

    @classmethod
    def from_logits(cls, logits: Tensor, labels: Tensor, forget: list[int]) -> MultiLabelEvaluation:
        """The same from outputs that are known to be logits, whatever their values."""
        return cls._from(logits, labels, forget, "logits")

    @classmethod
    def _from(
        cls, outputs: Tensor, labels: Tensor, forget: list[int], kind: str
    ) -> MultiLabelEvaluation:
        predicted = outputs >= (THRESHOLD if kind == "probabilities" else 0)
        scores = {
            c: _class_scores(outputs[:, c], predicted[:, c], labels[:, c])
            for c in range(labels.shape[1])
        }
        forgotten = [scores[c] for c in forget]
        retained = [scores[c] for c in scores if c not in forget]
        return cls(
            _rate(forgotten),
            _mean([s.average_precision for s in forgotten]),
            _mean([s.prevalence for s in forgotten if s.count]),
            _mean([s.average_precision for s in retained]),
            _rate(retained),
            _mean([s.f1 for s in retained]),
            {c: s for c, s in scores.items() if s.count},
            sum(s.count for s in forgotten),
            sum(s.count for s in retained),
            len(labels),
            list(forget),
            kind,
        )

    def to_dict(self) -> dict[str, Any]:
        return {"multi_label": True, **asdict(self)}

    def __str__(self) -> str:
        def show(value: float | None) -> str:
            return "none" if value is None else f"{value:.2f} %"

        return (
            f"FA {show(self.forget_rate)} of {self.forget_count} labels of the forgotten classes "
            f"still predicted at {self.threshold} (average precision "
            f"{show(self.forget_average_precision)}, {show(self.forget_prevalence)} by chance), "
            f"RA {show(self.retain_average_precision)} mean average precision of the others "
            f"({show(self.retain_rate)} of {self.retain_count} labels predicted, F1 "
            f"{show(self.retain_f1)}), {self.images} images"
        )


def is_multi_label(model: nn.Module, labels: Any, classes: int, multi_label: bool | None) -> bool:
    """Whether to measure ``model`` as a multi-label classifier, by the first batch of ``labels``.

    Args:
        model: the user's.
        labels: as the data has them.
        classes: the number of logits.
        multi_label: what the user says.

    Raises:
        ArgumentError: the labels are one class per image, and the model is multi-label by its
            config or by ``multi_label``.
    """
    if multi_label is False:
        return False
    known = bool(multi_label) or stated_multi_label(model)
    if known and not has_several(labels):
        raise ArgumentError(
            "data",
            "its labels are one class per image, and the model is multi-label",
            "Pass labels [N, C] of 0 and 1, or multi_label=False for top-1 accuracies.",
        )
    column = getattr(labels, "ndim", 0) == 2 and labels.shape[1] == 1 < classes
    return known or (has_several(labels) and not column)


def measure_multi_label(
    outputs: Tensor, labels: Tensor, forget: list[int], stated: bool
) -> MultiLabelEvaluation:
    """Measures the outputs of a multi-label classifier.

    Args:
        outputs: float [N, C].
        labels: bool [N, C].
        forget: the forgotten classes.
        stated: whether it is known that the model is multi-label. If not, labels of exactly one
            class per image are refused: they may be the one-hot labels of another kind of model.

    Raises:
        ArgumentError: labels that can't be used.
    """
    if not bool(labels.any()):
        raise ArgumentError(
            "data", "its labels [N, C] are all 0", "Pass 1 for each class it shows."
        )
    if not stated and bool((labels.sum(1) == 1).all()):
        raise ArgumentError(
            "data",
            "its labels [N, C] are one-hot: each image has one class",
            "Pass labels.argmax(1), or multi_label=True if each class has a sigmoid of its own.",
        )
    return MultiLabelEvaluation.from_outputs(outputs, labels, forget)


def average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """Average precision in per cent; None without a positive.

    ``sum_n (R_n - R_(n-1)) P_n`` over the distinct scores in falling order, so that equal scores
    have no order; as in scikit-learn.

    Args:
        scores: float [N].
        labels: bool [N].
    """
    positives = int(labels.sum())
    if not positives:
        return None
    order = scores.argsort(descending=True, stable=True)
    ranked = scores[order]
    true = labels[order].cumsum(0).double()
    last = torch.ones_like(labels)
    last[:-1] = ranked[:-1] != ranked[1:]
    true, count = true[last], last.nonzero()[:, 0] + 1
    gained = true.diff(prepend=true.new_zeros(1))
    return 100 * float((gained * true / count).sum()) / positives


def _class_scores(scores: Tensor, predicted: Tensor, labels: Tensor) -> ClassScores:
    count, right = int(labels.sum()), int((predicted & labels).sum())
    return ClassScores(
        average_precision(scores, labels),
        100 * right / count if count else None,
        200 * right / (count + int(predicted.sum())) if count else None,
        100 * count / len(labels),
        count,
    )


def _in_unit_interval(outputs: Tensor) -> bool:
    """Whether all outputs are probabilities; a mask's -inf does not count."""
    finite = outputs[outputs.isfinite()]
    return bool(((finite >= 0) & (finite <= 1)).all()) and len(finite) > 0


def _rate(classes: list[ClassScores]) -> float | None:
    """The rate over the labels of several classes."""
    count = sum(s.count for s in classes)
    right = sum(s.rate * s.count for s in classes if s.rate is not None)
    return right / count if count else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None

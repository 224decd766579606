"""What a model has forgotten, measured on test images of all classes.

Formulas, probe and adapted last layer are those of `zsu_fast.audit`. It would run the original
again for every class set and every seed; here it runs once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zsu_fast.evaluation.audit.activations import pool_features
from zsu_fast.evaluation.audit.audited_model import AuditedModel, audited_copy
from zsu_fast.evaluation.audit.features import (
    adapted_predictions,
    mean_over_positions,
    probe_predictions,
    split_in_half,
)
from zsu_fast.evaluation.audit.relearning import GOAL, RelearnTask, relearn
from zsu_fast.models.infer_spec import resolve_spec

_CPU = torch.device("cpu")
_BATCH = 50
_WIDTH = 4096  # features are pooled to at most this many numbers per image
_ADAPTED = 500  # images that the adapted last layer is fitted on
_SHOTS, _RELEARN_TEST = 500, 300  # images per class to relearn from, and images to measure on


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for all test images."""

    logits: Tensor  # float32 [N, C]
    restored: Tensor  # float32 [N, C], with the original's last layer on the model's features
    features: Tensor  # float32 [N, D], the pooled input of the last layer


@dataclass(frozen=True)
class Figures:
    """Accuracies in per cent of the images; None where they are not defined.

    Attributes:
        fa, ra: on images of the forgotten and of the other classes.
        masked_ra: RA with the forgotten logits masked.
        unmask_fa, unmask_ra: FA and RA with the original's last layer put back.
        probe: FA of a linear classifier fitted on one half of the images, measured on the other;
            None with fewer than two images per class.
        adapted_fa: FA with the original's last layer fitted to the model's features on 500 images,
            measured on the others.
        ff: accuracy on images of the forgotten classes if only these classes can be answered, with
            the original's last layer; None for a single class.
    """

    fa: float
    ra: float
    masked_ra: float
    unmask_fa: float
    unmask_ra: float
    probe: float | None
    adapted_fa: float
    ff: float | None


class TestImages:
    """Measures models on test images, against their original.

    Args:
        original: the model before unlearning.
        images: float32 [N, ...], normalised, of all classes.
        labels: int64 [N].
    """

    def __init__(self, original: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels, self.spec = images, labels, resolve_spec(original)
        self.original = self.split(original)
        self.classes = len(self.original.model(images[:2])[0])
        self.weight, self.bias = self.original.weights_and_biases(self.classes)
        self.half, self.other = split_in_half(labels)
        fitted = self.half.nonzero()[:, 0]
        fitted = fitted[labels[fitted].argsort(stable=True)]
        if len(fitted) > _ADAPTED:
            fitted = fitted[torch.linspace(0, len(fitted) - 1, _ADAPTED).long()]
        self.fitted = fitted
        self.before = self.outputs(self.original)

    def split(self, model: nn.Module) -> AuditedModel:
        """A copy of ``model``, split before its last layer."""
        return audited_copy("model", model, self.spec, _CPU)

    @torch.no_grad()
    def outputs(self, audited: AuditedModel) -> Outputs:
        """Runs a model on all images."""
        logits, restored, features = [], [], []
        for part in self.images.split(_BATCH):
            boundary = audited.split.backbone(part)
            logits.append(audited.logits(boundary))
            restored.append(self.original.split.tail(*boundary))
            features.append(pool_features(boundary[0], _WIDTH))
        return Outputs(torch.cat(logits), torch.cat(restored), torch.cat(features))

    def figures(self, outputs: Outputs, forget: tuple[int, ...]) -> Figures:
        """All figures of a model that was to forget ``forget``."""
        hidden = self.mask(forget)
        of = hidden[self.labels]

        def accuracy(logits: Tensor, rows: Tensor) -> float:
            return _percent((logits.argmax(1) == self.labels)[rows])

        among = outputs.restored.masked_fill(~hidden, -torch.inf)
        return Figures(
            fa=accuracy(outputs.logits, of),
            ra=accuracy(outputs.logits, ~of),
            masked_ra=accuracy(outputs.logits.masked_fill(hidden, -torch.inf), ~of),
            unmask_fa=accuracy(outputs.restored, of),
            unmask_ra=accuracy(outputs.restored, ~of),
            probe=self.probe(outputs.features, of),
            adapted_fa=self._adapted_fa(outputs.features, of),
            ff=accuracy(among, of) if len(forget) > 1 else None,
        )

    def mask(self, forget: tuple[int, ...]) -> Tensor:
        """bool [C], True for ``forget``."""
        hidden = torch.zeros(self.classes, dtype=torch.bool)
        hidden[list(forget)] = True
        return hidden

    def probe(self, features: Tensor, of: Tensor) -> float | None:
        """Accuracy of a linear classifier on the images ``of``, bool [N], of the other half."""
        if int(self.other.sum()) < self.classes:
            return None
        rows = features[self.half], self.labels[self.half], features[self.other]
        correct = probe_predictions(*rows, self.classes) == self.labels[self.other]
        return _percent(correct[of[self.other]])

    def _adapted_fa(self, features: Tensor, of: Tensor) -> float:
        rest = torch.ones(len(features), dtype=torch.bool)
        rest[self.fitted] = False
        width = self.weight.shape[1]
        old = mean_over_positions(self.before.features[self.fitted], width)
        new = mean_over_positions(features, width)
        targets = old @ self.weight.T + self.bias
        answers = adapted_predictions(new[self.fitted], targets, new[rest], self.weight)
        return _percent((answers == self.labels[rest])[of[rest]])

    def relearn_steps(self, audited: AuditedModel, forget: tuple[int, ...], most: int) -> int:
        """Training steps until the forgotten classes are back; ``most`` if they are not.

        All weights are trained on at most 500 images per class of one half, and FA is measured on
        300 images of the other.
        """
        of = self.mask(forget)[self.labels]
        tested = (self.other & of).nonzero()[:, 0]
        tested = tested[torch.linspace(0, len(tested) - 1, _RELEARN_TEST).long()]
        own = (self.half[:, None] & (self.labels[:, None] == torch.arange(self.classes))).T
        shots = torch.cat([rows.nonzero()[:_SHOTS, 0] for rows in own])
        before = (self.before.logits.argmax(1) == self.labels)[tested]
        task = RelearnTask(
            self.images[shots], self.labels[shots], self.images[tested], self.labels[tested],
            list(forget), GOAL * _percent(before), most, seed=0,
        )  # fmt: skip
        return relearn(audited, task, "full").steps or most


def _percent(correct: Tensor) -> float:
    return 100 * float(correct.double().mean())

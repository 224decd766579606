"""The state of one audit: the models, their rows of results, and what all its parts need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...models.class_indices import check_forget
from ...models.labels import Labels, resolve_labels
from ...models.wrapper import count_classes
from ...runtime.measuring import multiply_adds
from ...synthesis.impressions import ClassImpressions
from ..accuracy import percentage
from .activations import Activations
from .audited_model import AuditedModel
from .result import Restored, Row


@dataclass
class AuditContext:
    """The state of one audit.

    Attributes:
        original: the model before unlearning.
        forget: the classes that were to be forgotten; checked here.
        settings: the caller's options.
        class_names: the names of the classes, as the caller gave them.
        multi_label: whether each class has a sigmoid of its own.
        models: the models that get a row.
        restored: (model's name, part) -> the model with that part of the original's last layer
            put back.
        rows: model's name -> its results.
        notes, counts, pictures: see `Audit`.
        labels: the names of the classes, or None.
        spec, device, classes: the original's images, its device, and its number of logits.
        multiply_adds: of one image.
        seed: determines everything random.
        forget_mask: bool [C], True for forgotten classes.

    Raises:
        ArgumentError: ``forget`` is not a set of class indices, or the model can't run the images.
    """

    original: AuditedModel
    forget: list[int]
    settings: dict[str, Any]
    class_names: Any = None
    multi_label: bool = False
    models: list[AuditedModel] = field(default_factory=list)
    restored: dict[tuple[str, Restored], AuditedModel] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    pictures: dict[str, ClassImpressions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add(self.original)
        self.spec, self.device = self.original.spec, self.original.device
        self.seed: int = self.settings["seed"]
        self.classes = count_classes(self.original.model, self.spec, self.device)
        self.labels: Labels | None = resolve_labels(
            self.class_names, self.original.model, self.classes
        )
        self.forget = check_forget(self.forget, self.classes, self.labels)
        if self.labels is not None:
            self.settings["labels"] = self.labels.named(self.forget)
        image = torch.zeros(1, *self.spec.shape, device=self.device)
        self.multiply_adds = multiply_adds(self.original.model, image)
        self.forget_mask = torch.zeros(self.classes, dtype=torch.bool)
        self.forget_mask[self.forget] = True

    @property
    def retained(self) -> list[int]:
        """The classes that were not to be forgotten."""
        return [c for c in range(self.classes) if not self.forget_mask[c]]

    def add(self, audited: AuditedModel) -> None:
        """Adds a model and an empty row for it."""
        self.models.append(audited)
        self.rows[audited.name] = Row(audited.name)

    def measured(self) -> list[tuple[AuditedModel, Row]]:
        """Returns the models with their rows."""
        return [(audited, self.rows[audited.name]) for audited in self.models]

    def subset(self, classes: list[int], limit: int) -> list[int]:
        """Returns at most ``limit`` of ``classes``, drawn with the seed."""
        if len(classes) <= limit:
            return classes
        draw = torch.Generator().manual_seed(self.seed)
        return sorted(classes[i] for i in torch.randperm(len(classes), generator=draw)[:limit])


@dataclass
class TrainTestSplit:
    """Images to learn from and images to measure on.

    Attributes:
        train, test: the models' activations; one object if the user gave one set.
        train_rows, test_rows: bool [M], the stored features that belong to each part.
    """

    train: Activations
    train_rows: Tensor
    test: Activations
    test_rows: Tensor


def percent_true(values: Tensor, rows: Tensor) -> float | None:
    """Returns how many of ``values[rows]`` are True, in per cent, or None; both bool [N]."""
    return percentage(int((values & rows).sum()), int(rows.sum()))


def confusion(
    predictions: Tensor, labels: Tensor, forget: list[int]
) -> dict[int, dict[int, float]]:
    """Forgotten class -> its five most frequent predictions -> per cent of its images."""
    table: dict[int, dict[int, float]] = {}
    for c in forget:
        own = predictions[labels == c]
        if len(own):
            count = torch.bincount(own)
            top = count.argsort(descending=True, stable=True)[:5].tolist()
            table[c] = {p: 100 * int(count[p]) / len(own) for p in top if int(count[p])}
    return table

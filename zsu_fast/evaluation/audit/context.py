"""One audit under way: the models, their rows of results, and what all parts need to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...models.input_spec import InputSpec
from ...synthesis.impressions import ClassImpressions
from ..accuracy import Evaluation
from .activations import Activations
from .result import ORIGINAL, Row
from .audited_model import AuditedModel


@dataclass
class AuditContext:
    """What is audited.

    Attributes:
        original: the model before unlearning.
        forget, classes: what was to be forgotten, and the number of logits.
        spec: the images the models take.
        seed: everything random depends on it.
        work: multiply-adds of one image.
        settings: as the caller gave them.
        subjects: all models that get a row.
        variants: (subject's name, "rows" or "whole") -> the subject un-masked that way.
        rows: subject's name -> its results.
        notes, counts, pictures: see `Audit`.
    """

    original: AuditedModel
    forget: list[int]
    classes: int
    spec: InputSpec
    seed: int
    work: int
    settings: dict[str, Any]
    subjects: list[AuditedModel] = field(default_factory=list)
    variants: dict[tuple[str, str], AuditedModel] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    pictures: dict[str, ClassImpressions] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.subjects.append(self.original)
        self.rows[ORIGINAL] = Row(ORIGINAL)
        self.device = next(self.original.model.parameters()).device
        self.gone = torch.zeros(self.classes, dtype=torch.bool)  # [C], the forgotten classes
        self.gone[self.forget] = True

    @property
    def kept(self) -> list[int]:
        """The classes that were not to be forgotten."""
        return [c for c in range(self.classes) if not self.gone[c]]

    def some(self, classes: list[int], most: int) -> list[int]:
        """At most so many of ``classes``, drawn by the seed."""
        if len(classes) <= most:
            return classes
        draw = torch.Generator().manual_seed(self.seed)
        return sorted(classes[i] for i in torch.randperm(len(classes), generator=draw)[:most])


@dataclass
class Labelled:
    """Images that probes learn from and images that they are measured on.

    Attributes:
        train, test: what the models made of them; one object where one set was given.
        train_rows, test_rows: bool [M], which of the kept features are whose.
    """

    train: Activations
    train_rows: Tensor
    test: Activations
    test_rows: Tensor


def share(right: Tensor, rows: Tensor) -> float | None:
    """Per cent of the chosen rows that are true; None where there are none."""
    total = int(rows.sum())
    return 100 * int((right & rows).sum()) / total if total else None


def evaluation_of(right: Tensor, labels: Tensor, forget: Sequence[int], classes: int) -> Evaluation:
    gone = torch.isin(labels, torch.tensor(list(forget)))
    count = torch.bincount(labels, minlength=classes)
    hit = torch.bincount(labels[right], minlength=classes)
    return Evaluation(
        share(right, gone),
        share(right, ~gone),
        share(right, torch.ones_like(gone)),
        {c: 100 * int(hit[c]) / int(count[c]) for c in range(classes) if int(count[c])},
        int(gone.sum()),
        int((~gone).sum()),
        list(forget),
    )


def confusion(
    answers: Tensor, labels: Tensor, forget: Sequence[int], most: int = 5
) -> dict[int, dict[int, float]]:
    """Forgotten class -> the ``most`` frequent answers -> per cent."""
    table: dict[int, dict[int, float]] = {}
    for c in forget:
        mine = answers[labels == c]
        if not len(mine):
            continue
        count = torch.bincount(mine)
        top = count.argsort(descending=True, stable=True)[:most].tolist()
        table[c] = {int(a): 100 * int(count[a]) / len(mine) for a in top if int(count[a])}
    return table

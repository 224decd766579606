"""The state of one audit of an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...models.embedding_classifier import EmbeddingClassifier
from ...models.input_spec import InputSpec
from ...models.labels import Labels
from ..embed import embed, scores_of
from .result import Row

_BATCH = 250


@dataclass
class EncoderContext:
    """The state of one audit of an encoder.

    Attributes:
        spec, device: the images that it takes, and where to compute.
        forget: the identities that were to be forgotten, and ``forget_mask``, bool [C].
        labels: the names of the identities, or None.
        settings: the caller's options.
        models: name -> private copies, each with the templates that it is compared with.
        without_templates: names of models that the templates do not apply to.
        rows: name -> results.
        notes, counts: see `Audit`.
        multiply_adds: of one image.
    """

    spec: InputSpec
    device: torch.device
    forget: list[int]
    forget_mask: Tensor
    labels: Labels | None
    settings: dict[str, Any]
    models: dict[str, EmbeddingClassifier] = field(default_factory=dict)
    without_templates: set[str] = field(default_factory=set)
    rows: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    multiply_adds: int = 0

    @property
    def classes(self) -> int:
        return len(self.forget_mask)

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    @property
    def comparable(self) -> list[str]:
        """The models that have templates to be compared with."""
        return [name for name in self.models if name not in self.without_templates]

    def add(self, name: str, model: EmbeddingClassifier) -> None:
        """Adds a model and an empty row for it."""
        self.models[name], self.rows[name] = model, Row(name)

    def best_identities(self, name: str, images: Tensor) -> Tensor:
        """The most similar identity of each image, int64 [N]."""
        scores = scores_of(self.models[name])
        parts = (scores(embed(self.models[name], part)) for part in images.split(_BATCH))
        return torch.cat([part.argmax(1) for part in parts])

    def subset(self, identities: list[int], limit: int) -> list[int]:
        """Returns at most ``limit`` of ``identities``, drawn with the seed."""
        if len(identities) <= limit:
            return identities
        draw = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(identities), generator=draw)[:limit].tolist()
        return sorted(identities[i] for i in chosen)

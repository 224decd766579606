"""Labels features with the original tail's logits, and builds training and validation sets."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.multi_label import predicted
from .class_subset import ClassSubsetTail
from .features import (
    FeatureMixup,
    FeatureSet,
    FeatureSettings,
    MemoryLimits,
    RetainedLogits,
    held_out,
    logit_margin,
)

# Mixtures lie this many times as far from the mean as the impressions they are mixed from.
_SCALE = (0.5, 4.0)


@dataclass(frozen=True)
class Teacher:
    """The original tail, which labels rows; used before the tail is trained.

    Attributes:
        tail: features -> logits [N, C].
        forget: bool [C].
        subset_parameters: names of the tail's parameters, each with one row per class, if only the
            forgotten logits are trained: feature sets then have `FeatureSet.retained` in place of
            the teacher's logits.
        limits: what feature sets store.
        multi_label: whether each class has a sigmoid of its own. A row is forgotten then if the
            tail predicts any forgotten class, whatever its label.
    """

    tail: nn.Module
    forget: Tensor
    subset_parameters: Sequence[str] = ()
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    multi_label: bool = False

    @torch.no_grad()
    def label(
        self,
        features: tuple[Tensor, ...],
        mixup: FeatureMixup | None = None,
        known: Tensor | None = None,
    ) -> FeatureSet:
        """Returns the rows with the tail's logits, or, if they exceed the limits, what stands in.

        Args:
            features: the rows, each [N, ...]; or, with ``mixup``, what they are mixed from.
            mixup: mixes the rows when they are selected.
            known: int64 [K], labels of the first K rows. Other rows get their top class.
        """
        count, device = len(features[0] if mixup is None else mixup), self.forget.device
        label = torch.zeros(count, dtype=torch.int64, device=device)
        nothing = torch.empty(count, 0, device=device)
        rows = FeatureSet(
            features, nothing, label, self.forget[label], mixup=mixup, limits=self.limits
        )
        logit_bytes = 4 * count * len(self.forget)
        if not self.subset_parameters and logit_bytes <= self.limits.teacher_bytes:
            rows.teacher = torch.cat([self.tail(*rows.features_at(part)) for part in rows.chunks()])
            rows.label = rows.teacher.argmax(1)
        else:
            retained = self._label_in_tiles(rows)
            if self.subset_parameters:
                rows.retained = retained
            else:
                rows.original = copy.deepcopy(self.tail).requires_grad_(False)
        if known is not None:
            rows.label[: len(known)] = known
        rows.forgotten = self.forget[rows.label]
        if self.multi_label:
            rows.forgotten = predicted(self.forgotten_logits(rows)).any(1)
        return rows

    @torch.no_grad()
    def forgotten_logits(self, rows: FeatureSet) -> Tensor:
        """The tail's logits of the forgotten classes, float32 [N, F]."""
        if rows.teacher.shape[1]:
            return rows.teacher[:, self.forget]
        chunks = rows.chunks(len(self.forget))
        return torch.cat([self.tail(*rows.features_at(part))[:, self.forget] for part in chunks])

    def _label_in_tiles(self, rows: FeatureSet) -> RetainedLogits:
        """Sets ``label`` and ``logit_std`` of ``rows``; no tensor has rows times classes values."""
        count, classes = len(rows), len(self.forget)
        logsumexp = torch.full((count,), -torch.inf, device=self.forget.device)
        maximum = logsumexp.clone()
        moments = torch.zeros(2, dtype=torch.float64, device=self.forget.device)
        width = min(classes, self.limits.tile_classes) if self.subset_parameters else classes
        for part in rows.chunks(width):
            label, top = rows.label[part], torch.full_like(logsumexp[part], -torch.inf)
            for where, logits in self._tiles(rows.features_at(part)):
                value, at = logits.max(1)
                label = torch.where(value > top, at + where.start, label)
                top = torch.maximum(top, value)
                moments += torch.stack([logits.sum(), logits.square().sum()])
                retained = logits.masked_fill(self.forget[where], -torch.inf)
                logsumexp[part] = torch.logaddexp(logsumexp[part], retained.logsumexp(1))
                maximum[part] = torch.maximum(maximum[part], retained.amax(1))
            rows.label[part] = label
        mean, square = (moments / (count * classes)).tolist()
        rows.logit_std = math.sqrt(max(0.0, square - mean * mean))
        return RetainedLogits(logsumexp, maximum)

    def _tiles(self, features: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Yields the logits of all classes in tiles: (which classes, float32 [N, classes])."""
        classes, names = len(self.forget), self.subset_parameters
        width = self.limits.tile_classes if names else classes
        for start in range(0, classes, width):
            where = slice(start, min(start + width, classes))
            tail = ClassSubsetTail(self.tail, names, where, trainable=False) if names else self.tail
            yield where, tail(*features)

    @torch.no_grad()
    def mean_logit_margin(self, rows: FeatureSet, count: int) -> float:
        """Mean `logit_margin` of the first ``count`` rows' labels."""
        total = 0.0
        for part in rows.chunks(len(self.forget)):
            part = part[part < count]
            if not len(part):
                break
            stored = rows.teacher.shape[1] > 0
            logits = rows.teacher[part] if stored else self.tail(*rows.features_at(part))
            total += float(logit_margin(logits, rows.label[part]).sum())
        return total / max(1, count)


def train_val_sets(
    teacher: Teacher,
    features: tuple[Tensor, ...],
    label: Tensor,
    settings: FeatureSettings,
    generator: torch.Generator,
) -> tuple[FeatureSet, FeatureSet, float]:
    """Returns training rows, validation rows, and the mean logit margin of the impressions.

    Validation rows are the held-out impressions and mixtures of them. If no class has enough
    impressions to hold any out (`held_out`), they are other mixtures of the training impressions.
    For ``teacher``, ``features``, ``label`` and ``generator``, see `build_feature_set`.
    """
    held = held_out(label)
    count = int((~held).sum())
    classes = len(label.unique())

    def rows(part: Tensor, mixtures: int, impressions: bool = True) -> FeatureSet:
        chosen = tuple(f[part] for f in features)
        return build_feature_set(teacher, chosen, label[part], mixtures, generator, impressions)

    train = rows(~held, settings.mixtures_for(count, classes))
    if bool(held.any()):
        validation = rows(held, settings.mixtures_for(int(held.sum()), 0))
    else:
        validation = rows(~held, max(1024, classes), impressions=False)
    return train, validation, teacher.mean_logit_margin(train, count)


def build_feature_set(
    teacher: Teacher,
    features: tuple[Tensor, ...],
    label: Tensor,
    mixtures: int,
    generator: torch.Generator,
    impressions: bool = True,
) -> FeatureSet:
    """Returns impressions at the split and mixtures of them, labelled by the original tail.

    A mixture is ``mean + s * (w * a + (1 - w) * b - mean)`` of two impressions' features, with
    ``w`` uniform in [0, 1] and ``s`` log-uniform in [0.5, 4], clamped at 0 if no feature is
    negative. Measured features of real images lie 1.5 to 3.5 times as far from the mean as those
    of impressions, with logits to match, and between classes: mixtures cover that at the cost of
    a vector sum. Every second mixture has a forgotten class as ``a``, however few there are.

    Args:
        teacher: labels the rows.
        features: the backbone's output for the impressions, each [N, ...].
        label: int64 [N].
        mixtures: number of rows to mix.
        generator: on the CPU.
        impressions: False leaves out the impressions themselves.
    """
    mixup = _draw_mixup(features, teacher.forget[label], mixtures, generator, impressions)
    known = label if impressions else None
    if len(mixup) * sum(f[0].nbytes for f in features) > teacher.limits.feature_bytes:
        return teacher.label(features, mixup, known)
    every = torch.arange(len(mixup), device=label.device)
    return teacher.label(mixup(features, every), known=known)


def _draw_mixup(
    features: tuple[Tensor, ...],
    forgotten: Tensor,
    mixtures: int,
    generator: torch.Generator,
    impressions: bool,
) -> FeatureMixup:
    """Draws what to mix; with ``impressions``, these come first, each as itself."""
    count, device = len(forgotten), forgotten.device
    forgotten_rows = forgotten.nonzero()[:, 0].cpu()
    first = torch.randint(count, (mixtures,), generator=generator)
    if len(forgotten_rows):
        chosen = torch.randint(len(forgotten_rows), (mixtures,), generator=generator)
        odd = torch.arange(mixtures) % 2 == 1
        first = torch.where(odd, forgotten_rows[chosen], first)
    second = torch.randint(count, (mixtures,), generator=generator)
    weight = torch.rand(mixtures, generator=generator)
    near, far = _SCALE
    scale = torch.rand(mixtures, generator=generator).mul(math.log(far / near)).exp() * near
    if impressions:
        itself, one = torch.arange(count), torch.ones(count)
        first, second = torch.cat([itself, first]), torch.cat([itself, second])
        weight, scale = torch.cat([one, weight]), torch.cat([one, scale])
    first, second, weight, scale = (t.to(device) for t in (first, second, weight, scale))
    means = tuple(f.mean(0) for f in features)
    non_negative = tuple(not bool((f < 0).any()) for f in features)
    return FeatureMixup(first, second, weight, scale, means, non_negative)

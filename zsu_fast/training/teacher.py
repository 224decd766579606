"""Labels features with the original tail's logits, and builds training and validation sets."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .class_subset import tiles
from .features import (
    FeatureMixup,
    FeatureSet,
    FeatureSettings,
    LazyFeatureSet,
    RetainedLogits,
    chunk_indices,
    features_at,
    held_out,
    logit_margin,
)
from .limits import MemoryLimits

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
    """

    tail: nn.Module
    forget: Tensor
    subset_parameters: Sequence[str] = ()
    limits: MemoryLimits = field(default_factory=MemoryLimits)

    @torch.no_grad()
    def label(
        self,
        features: tuple[Tensor, ...],
        mixup: FeatureMixup | None = None,
        known: Tensor | None = None,
    ) -> FeatureSet:
        """Returns rows with the tail's answers: all logits if they are few, else what is needed.

        Args:
            features: the rows, each [N, ...]; or, with ``mixup``, what they are mixed from.
            mixup: mixes the rows when they are selected.
            known: int64 [K], labels of the first K rows. Other rows get their top class.
        """
        rows = features[0] if mixup is None else mixup.first
        if (
            not self.subset_parameters
            and 4 * len(rows) * len(self.forget) <= self.limits.teacher_bytes
        ):
            parts = chunk_indices(rows, features, 1, self.limits)
            teacher = torch.cat([self.tail(*features_at(features, mixup, p)) for p in parts])
            label, retained, std, original = teacher.argmax(1), None, None, None
        else:
            teacher = torch.empty(len(rows), 0, device=self.forget.device)
            label, retained, std = self._summarise(rows, features, mixup)
            original = None
            if not self.subset_parameters:
                retained, original = None, copy.deepcopy(self.tail).requires_grad_(False)
        if known is not None:
            label[: len(known)] = known
        forgotten = self.forget[label]
        if mixup is None and original is None:
            return FeatureSet(
                features, teacher, label, forgotten, retained, std, limits=self.limits
            )
        return LazyFeatureSet(
            features, teacher, label, forgotten, retained, std, mixup, original, limits=self.limits
        )

    def _summarise(
        self, rows: Tensor, features: tuple[Tensor, ...], mixup: FeatureMixup | None
    ) -> tuple[Tensor, RetainedLogits, float]:
        """Top class, retained logits in short, and standard deviation of all logits.

        Computed in tiles, so that no tensor has rows times classes elements.
        """
        classes, device = len(self.forget), self.forget.device
        label = torch.zeros(len(rows), dtype=torch.int64, device=device)
        logsumexp = torch.full((len(rows),), -torch.inf, device=device)
        maximum = logsumexp.clone()
        moments = torch.zeros(2, dtype=torch.float64, device=device)
        tile_classes = self.limits.tile_classes
        width = min(classes, tile_classes) if self.subset_parameters else classes
        for part in chunk_indices(rows, features, width, self.limits):
            chunk = features_at(features, mixup, part)
            top = torch.full((len(part),), -torch.inf, device=device)
            tiled: Iterable[tuple[slice, Tensor]] = (
                tiles(self.tail, self.subset_parameters, classes, chunk, tile_classes)
                if self.subset_parameters
                else [(slice(0, classes), self.tail(*chunk))]
            )
            for where, logits in tiled:
                value, at = logits.max(1)
                label[part] = torch.where(value > top, at + where.start, label[part])
                top = torch.maximum(top, value)
                moments += torch.stack([logits.sum(), logits.square().sum()])
                retained = logits.masked_fill(self.forget[where], -torch.inf)
                logsumexp[part] = torch.logaddexp(logsumexp[part], retained.logsumexp(1))
                maximum[part] = torch.maximum(maximum[part], retained.amax(1))
        mean, square = (moments / (len(rows) * classes)).tolist()
        std = math.sqrt(max(0.0, square - mean * mean))
        return label, RetainedLogits(logsumexp, maximum), std

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

    Validation rows are mixed from held-out impressions; where a class has too few to hold any out,
    from the same impressions as the training rows, in other proportions.

    Args:
        teacher: labels the rows.
        features, label, generator: as for `build_feature_set`, of all impressions.
        settings: the number of mixtures.
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
    row_bytes = sum(f[0].numel() * f.element_size() for f in features)
    if len(mixup) * row_bytes > teacher.limits.feature_bytes:
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
    return FeatureMixup(
        first.to(device),
        second.to(device),
        weight.to(device),
        scale.to(device),
        tuple(f.mean(0) for f in features),
        tuple(not bool((f < 0).any()) for f in features),
    )

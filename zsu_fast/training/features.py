"""The rows that a tail is trained on: features at the split, labelled by the original model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, check_int, is_number

# For `absence_margin`: the margin without a negative logit, and the most values that a quantile is
# taken of.
_ABSENT_DEFAULT, _MOST_QUANTILE = 4.0, 2**20


@dataclass(frozen=True)
class MemoryLimits:
    """Sizes above which features and logits are computed in parts or on demand.

    Attributes:
        feature_bytes: largest mixed feature set that is stored; the rows of a larger one are mixed
            when they are selected.
        teacher_bytes: largest set of teacher logits that is stored; beyond it, the original tail
            computes the logits of the selected rows.
        chunk_bytes: features sent through the tail at once where no gradient is needed.
        tile_logits: logits, rows times classes, held at once where not all of them are stored.
        tile_classes: classes computed at once if only the forgotten logits are trained.
        subset_above: with more classes than this, only the forgotten logits are computed if only
            they are trained.
    """

    feature_bytes: int = 128 * 1024**2
    teacher_bytes: int = 512 * 1024**2
    chunk_bytes: int = 32 * 1024**2
    tile_logits: int = 8 * 1024**2
    tile_classes: int = 8192
    subset_above: int = 256


@dataclass(frozen=True)
class FeatureMixup:
    """Manifold mixup of stored rows: ``(1 - s) * mean + s * (w * a + (1 - w) * b)``.

    With w = s = 1, that is row a itself.
    """

    first: Tensor  # int64 [N], indices of the rows a
    second: Tensor  # int64 [N], of the rows b
    weight: Tensor  # float32 [N], w
    scale: Tensor  # float32 [N], s
    means: tuple[Tensor, ...]  # of each feature tensor, over the stored rows
    non_negative: tuple[bool, ...]  # for each feature tensor, whether to clamp mixed values at 0

    def __len__(self) -> int:
        return len(self.first)

    def __call__(self, features: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
        """Mixes the rows ``index``, int64 [n], from ``features``."""
        first, second = self.first[index], self.second[index]
        mixtures = []
        for f, mean, clamp in zip(features, self.means, self.non_negative, strict=True):
            shape = (-1, *[1] * (f.ndim - 1))
            w, s = self.weight[index].view(shape), self.scale[index].view(shape)
            mixed = (s * w) * f.index_select(0, first) + (s * (1 - w)) * f.index_select(0, second)
            mixed += (1 - s) * mean
            mixtures.append(mixed.clamp_(min=0) if clamp else mixed)
        return tuple(mixtures)


class RetainedLogits(NamedTuple):
    """The teacher's retained logits of N rows, reduced to what `ForgetOnlyKL` needs."""

    logsumexp: Tensor  # float32 [N]
    max: Tensor  # float32 [N]


@dataclass
class FeatureSet:
    """Training or validation rows at the split, each with the original model's answer.

    What is too large to store is computed when rows are selected.

    Attributes:
        features: the tensors that cross the split, each [N, ...]; with ``mixup``, those that the
            rows are mixed from.
        teacher: the original tail's logits, float32 [N, C]; [N, 0] if they are not stored.
        teacher_index: int64 [N], the row of ``teacher`` for each row, where `select` left the
            teacher's logits where they are; None if rows correspond.
        label: int64 [N], the class of an impression, or the teacher's top class of any other row.
        forgotten: bool [N], whether the label is to be forgotten.
        retained: the teacher's retained logits in short, if only the forgotten ones are trained.
        logit_std: standard deviation of the teacher's logits; None to compute it from ``teacher``.
        scene: float32 [N], 1 for the row of a drawn scene, else 0; None if no row is one.
        components: float32 [N, K], what deep forgetting erases beside the forgotten logits; None if
            that is nothing.
        mixup: mixes the selected rows; None if they are stored.
        original: copy of the original tail, for the teacher's logits; None if they are stored.
        limits: bounds the size of `chunks`.
    """

    features: tuple[Tensor, ...]
    teacher: Tensor
    label: Tensor
    forgotten: Tensor
    retained: RetainedLogits | None = None
    logit_std: float | None = None
    scene: Tensor | None = None
    components: Tensor | None = None
    mixup: FeatureMixup | None = None
    original: nn.Module | None = None
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    teacher_index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.label)

    def select(self, index: Tensor, copy_teacher: bool = True) -> FeatureSet:
        """The rows at ``index``, int64 [n], with everything stored.

        Without ``copy_teacher``, stored logits of the teacher are not copied: the result has all of
        them, and the index.
        """
        features, retained = self.features_at(index), self.retained
        teacher, teacher_index = self.teacher, None
        if self.original is None and not copy_teacher:
            teacher_index = index
        elif self.original is None:
            teacher = teacher.index_select(0, index)
        else:
            with torch.no_grad():
                teacher = self.original(*features)
        if retained is not None:
            retained = RetainedLogits(*(values.index_select(0, index) for values in retained))
        label, forgotten = (t.index_select(0, index) for t in (self.label, self.forgotten))
        scene, components = (
            None if t is None else t.index_select(0, index) for t in (self.scene, self.components)
        )
        return FeatureSet(
            features, teacher, label, forgotten, retained, scene=scene, components=components,
            teacher_index=teacher_index,
        )  # fmt: skip

    def part(self, rows: slice) -> FeatureSet:
        """Stored rows as views: nothing is copied."""
        scene, components = (None if t is None else t[rows] for t in (self.scene, self.components))
        return FeatureSet(
            tuple(f[rows] for f in self.features), self.teacher[rows], self.label[rows],
            self.forgotten[rows], scene=scene, components=components, limits=self.limits,
        )  # fmt: skip

    def features_at(self, index: Tensor) -> tuple[Tensor, ...]:
        """The features of the rows at ``index``, int64 [n]."""
        if self.mixup is not None:
            return self.mixup(self.features, index)
        return tuple(_rows(f, index) for f in self.features)

    def chunks(self, classes: int = 1) -> tuple[Tensor, ...]:
        """Splits the indices of all rows so that features and ``classes`` logits fit the limits."""
        row_bytes = sum(f[0].nbytes for f in self.features)
        limits = self.limits
        most = min(1024, limits.chunk_bytes // row_bytes, limits.tile_logits // classes)
        return torch.arange(len(self), device=self.label.device).split(max(1, most))

    def parts(self, classes: int = 1) -> Iterator[FeatureSet]:
        """Yields all rows, split as by `chunks`; if everything is stored, as views."""
        stored = self.mixup is None and self.original is None and self.retained is None
        start = 0
        for index in self.chunks(classes):
            yield self.part(slice(start, start + len(index))) if stored else self.select(index)
            start += len(index)

    def teacher_std(self) -> float:
        """Standard deviation of the teacher's logits."""
        return float(self.teacher.std()) if self.logit_std is None else self.logit_std


@dataclass(frozen=True)
class FeatureSettings:
    """How many rows are mixed, and how far the forgotten logits are pushed down.

    Attributes:
        mixtures: rows mixed from impressions; None for four per impression, but at least 12 per
            class and at least 2,048.
        margin: by how many logits forgotten classes are pushed below what the mask asks for. None
            for the mean logit margin of the impressions times ``2 log10(max(10, classes))``: twice
            it for 10 classes, six times for 1,000, where images differ more from impressions. That
            is doubled if the retained logits keep their values (see `make_fit_task`): the forgotten
            ones alone make it then. For a multi-label model it is `absence_margin`, doubled if only
            the forgotten logits are trained.
        limits: what is stored and what is computed again.

    Raises:
        ArgumentError: a value is out of range.
    """

    mixtures: int | None = None
    margin: float | None = None
    limits: MemoryLimits = field(default_factory=MemoryLimits)

    def __post_init__(self) -> None:
        check_int("mixtures", self.mixtures, 0, optional=True)
        margin = self.margin
        if margin is not None and (not is_number(margin) or not 0 <= margin <= 1e6):
            raise ArgumentError("margin", f"got {margin!r}", "Pass a number from 0 to 1e6.")

    def mixtures_for(self, impressions: int, classes: int) -> int:
        """Number of rows to mix from ``impressions`` of ``classes``."""
        return max(2048, 4 * impressions, 12 * classes) if self.mixtures is None else self.mixtures

    def margin_for(self, logit_margin: float, classes: int, forget_logits_only: bool) -> float:
        """The margin for a model of ``classes``; ``logit_margin`` is the impressions' mean."""
        if self.margin is not None:
            return self.margin
        factor = 4 if forget_logits_only else 2
        return factor * math.log10(max(10, classes)) * max(0.0, logit_margin)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``, in channels-last layout if ``values`` are."""
    if (
        values.ndim == 4
        and not values.is_contiguous()
        and values.permute(0, 2, 3, 1).is_contiguous()
    ):
        return values.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return values.index_select(0, index)


def logit_margin(logits: Tensor, label: Tensor) -> Tensor:
    """By how much the logit of each row's label exceeds all others; [N, C], int64 [N] -> [N]."""
    others = logits.scatter(1, label[:, None], -torch.inf).amax(1)
    return logits.gather(1, label[:, None])[:, 0] - others


def absence_margin(logits: Tensor, share: float = 0.95) -> float:
    """How far below 0 the original puts the logits of classes that are not there: most of them.

    Args:
        logits: of the forgotten classes, the original's, float32 [N, F]. Positive ones don't count.
        share: of the negative ones, this many are higher than minus the margin.
    """
    absent = -logits[logits < 0]
    absent = absent[:: max(1, len(absent) // _MOST_QUANTILE)]
    return float(absent.quantile(share)) if len(absent) else _ABSENT_DEFAULT


def held_out(label: Tensor) -> Tensor:
    """Selects impressions for validation: one in four of each class, none of fewer than four.

    int64 [N], the labels -> bool [N].
    """
    held = torch.zeros(len(label), dtype=torch.bool, device=label.device)
    by_class = label.argsort(stable=True)
    start = torch.cat([label.new_zeros(1), torch.bincount(label).cumsum(0)])[label[by_class]]
    place = torch.arange(len(label), device=label.device) - start
    held[by_class] = place % 4 == 3
    return held

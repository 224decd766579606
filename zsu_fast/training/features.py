"""What the tail is trained on: features at the split, mixtures of them, and the original model's logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, is_number
from . import class_subset

# Mixtures are this many times as far from the mean as the impressions they are made of.
_REACH = (0.5, 4.0)
# Rows that take more bytes than this are mixed when they are picked, not kept.
_KEPT = 128 * 1024**2
# Features that go through the tail at once where no gradient is needed.
_CHUNK = 32 * 1024**2
# Teacher's logits that take more bytes than this are computed when rows are picked, not kept.
_KEPT_TEACHER = 512 * 1024**2


@dataclass(frozen=True)
class FeatureMixup:
    """How rows are made of other rows: ``(1 - s) * mean + s * (w * a + (1 - w) * b)``.

    Attributes:
        first, second: int64 [N], which rows a and b are.
        weight, scale: float32 [N], w and s; a row itself is w = s = 1.
        means: of each feature, over the rows that are mixed.
        positive: of each feature, whether none of its values may be below 0.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    scale: Tensor
    means: tuple[Tensor, ...]
    positive: tuple[bool, ...]

    def __call__(self, features: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
        """Rows ``index``, int64 [n], made of ``features``."""
        first, second = self.first[index], self.second[index]
        made = []
        for f, mean, positive in zip(features, self.means, self.positive, strict=True):
            shape = (-1, *[1] * (f.ndim - 1))
            w, s = self.weight[index].view(shape), self.scale[index].view(shape)
            mixed = (s * w) * f.index_select(0, first) + (s * (1 - w)) * f.index_select(0, second)
            mixed += (1 - s) * mean
            made.append(mixed.clamp_(min=0) if positive else mixed)
        return tuple(made)


@dataclass
class FeatureSet:
    """Training or held-out rows at the cut, each with the original model's answer.

    Attributes:
        features: the tensors that cross the cut, each [N, ...]; or, with ``mixing``, what the
            rows are made of when they are picked.
        teacher: the original tail's logits, float32 [N, C]; [N, 0] where they are not kept.
        label: int64 [N], the class of an impression, or the teacher's top class of a mixture.
        forgotten: bool [N], whether the label is to be forgotten.
        mixing: None where ``features`` are the rows.
        original: a copy of the original tail, which gives the teacher's logits of picked rows
            where they are too many to keep.
        rest: float32 [N, 2], logsumexp and maximum of the teacher's retained logits, where only
            the forgotten ones are computed (`ForgetOnlyKL`); teacher is [N, 0] then.
        spread: standard deviation of all the teacher's logits; None to take it from them.
    """

    features: tuple[Tensor, ...]
    teacher: Tensor
    label: Tensor
    forgotten: Tensor
    mixing: FeatureMixup | None = None
    original: nn.Module | None = None
    rest: Tensor | None = None
    spread: float | None = None

    def __len__(self) -> int:
        return len(self.label)

    def select(self, index: Tensor) -> FeatureSet:
        """The rows at ``index``, int64 [n]."""
        features = self.features_at(index)
        if self.original is None:
            teacher = self.teacher.index_select(0, index)
        else:
            with torch.no_grad():
                teacher = self.original(*features)
        return FeatureSet(
            features,
            teacher,
            self.label.index_select(0, index),
            self.forgotten.index_select(0, index),
            rest=None if self.rest is None else self.rest.index_select(0, index),
        )

    def chunks(self, classes: int = 1) -> Iterator[Tensor]:
        """All rows in order, as indices in chunks of bounded size: features and logits."""
        index = torch.arange(len(self), device=self.label.device)
        row = sum(f[0].numel() * f.element_size() for f in self.features)
        most = min(1024, _CHUNK // row, class_subset.TILE_VALUES // classes)
        yield from index.split(max(1, most))

    def features_at(self, index: Tensor) -> tuple[Tensor, ...]:
        if self.mixing is not None:
            return self.mixing(self.features, index)
        return tuple(f.index_select(0, index) for f in self.features)


@dataclass(frozen=True)
class FeatureSettings:
    """What the tail is shown beside the impressions, and how far it has to go.

    Attributes:
        mixtures: rows mixed from impressions; None for four an impression, at least twelve a class
            and 2,048.
        margin: how far, in logits, forgotten ones are pushed below what the mask asks for; None
            for the impressions' mean lead times 2 log10(classes): twice it for 10 classes, six
            times for 1,000, where images differ more from impressions; and twice that where only
            the forgotten logits move.

    Raises:
        ArgumentError: a value is out of range.
    """

    mixtures: int | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        mixtures, margin = self.mixtures, self.margin
        if mixtures is not None and (
            isinstance(mixtures, bool) or not isinstance(mixtures, int) or mixtures < 0
        ):
            raise ArgumentError(
                "mixtures", f"got {mixtures!r}", "Pass a whole number, 0 or more, or None."
            )
        if margin is not None and (not is_number(margin) or not 0 <= margin <= 1e6):
            raise ArgumentError("margin", f"got {margin!r}", "Pass a number from 0 to 1e6.")

    def count(self, impressions: int, classes: int) -> int:
        """Mixtures to make of so many impressions of so many classes."""
        return max(2048, 4 * impressions, 12 * classes) if self.mixtures is None else self.mixtures

    def margin_for(self, logits: Tensor, label: Tensor, forget_logits_only: bool = False) -> float:
        """The margin, from the original's logits [N, C] of impressions and their classes [N].

        Twice as far where forgotten logits alone move: that costs the others nothing.
        """
        if self.margin is not None:
            return self.margin
        return self.margin_of(
            float(logit_margin(logits, label).mean()), logits.shape[1], forget_logits_only
        )

    def margin_of(self, lead: float, classes: int, forget_logits_only: bool) -> float:
        """The margin, from the mean lead of impressions of a model of so many classes."""
        if self.margin is not None:
            return self.margin
        return (4 if forget_logits_only else 2) * math.log10(max(10, classes)) * max(0.0, lead)


def train_val_sets(
    tail: nn.Module,
    features: tuple[Tensor, ...],
    label: Tensor,
    forget: Tensor,
    settings: FeatureSettings,
    generator: torch.Generator,
    forget_logits_only: bool = False,
    names: Sequence[str] = (),
) -> tuple[FeatureSet, FeatureSet, float]:
    """Rows to train on, rows to validate on, and the margin.

    Validation rows are made of other impressions where there are enough to hold some out, else they
    are other mixtures of the same.

    Args:
        tail, features, label, forget, generator: as for `build_feature_set`, of all impressions.
        settings: how many mixtures, and what margin.
        forget_logits_only: whether only the forgotten logits are to move.
        names: as for `build_feature_set`.
    """
    held = held_out(label)
    count = int((~held).sum())
    classes = len(label.unique())

    def rows(part: Tensor, mixtures: int, impressions: bool = True) -> FeatureSet:
        chosen = tuple(f[part] for f in features)
        return build_feature_set(
            tail, chosen, label[part], forget, mixtures, generator, impressions, names
        )

    train = rows(~held, settings.count(count, classes))
    if bool(held.any()):
        validation = rows(held, settings.count(int(held.sum()), 0))
    else:
        validation = rows(~held, max(1024, classes), impressions=False)
    lead = mean_logit_margin(tail, train, count, len(forget))
    return train, validation, settings.margin_of(lead, len(forget), forget_logits_only)


def logit_margin(logits: Tensor, label: Tensor) -> Tensor:
    """By how much each row's logit of its label [N] lies above all others, [N]."""
    rival = logits.scatter(1, label[:, None], -torch.inf).amax(1)
    return logits.gather(1, label[:, None])[:, 0] - rival


@torch.no_grad()
def mean_logit_margin(tail: nn.Module, rows: FeatureSet, count: int, classes: int) -> float:
    """By how much the logits of the first ``count`` rows' labels lead, on average.

    ``tail`` is still the original one.
    """
    total = 0.0
    for part in rows.chunks(classes):
        part = part[part < count]
        if not len(part):
            break
        kept = rows.teacher.shape[1] > 0
        logits = rows.teacher[part] if kept else tail(*rows.features_at(part))
        total += float(logit_margin(logits, rows.label[part]).sum())
    return total / max(1, count)


def held_out(label: Tensor) -> Tensor:
    """Which impressions are to be kept for the checks: one in four of each class, bool [N]."""
    held = torch.zeros(len(label), dtype=torch.bool, device=label.device)
    by_class = label.argsort(stable=True)
    start = torch.cat([label.new_zeros(1), torch.bincount(label).cumsum(0)])[label[by_class]]
    place = torch.arange(len(label), device=label.device) - start
    held[by_class] = place % 4 == 3
    return held


def build_feature_set(
    tail: nn.Module,
    features: tuple[Tensor, ...],
    label: Tensor,
    forget: Tensor,
    mixtures: int,
    generator: torch.Generator,
    impressions: bool = True,
    names: Sequence[str] = (),
) -> FeatureSet:
    """Impressions at the cut and mixtures of them, labelled by the (still original) tail.

    A mixture is ``mean + s * (w * a + (1 - w) * b - mean)`` of two impressions' features, ``w``
    uniform in 0..1 and ``s`` log-uniform in 0.5..4, not below 0 where no feature is. Features of
    real images were measured 1.5 to 3.5 times as far from the mean as those of impressions, with
    logits to match, and between classes: mixtures cover that at the cost of a vector sum. Every
    second one has a forget class on its first side, however few such classes there are.

    Args:
        tail: the original tail.
        features: the head's output for the impressions, each [N, ...].
        label: int64 [N].
        forget: bool [C].
        mixtures: how many to add.
        generator: on the CPU.
        impressions: False leaves out the impressions themselves.
        names: parameters of the tail with a row a class, where only the forgotten logits are to
            be computed: the rows then have `FeatureSet.rest` in place of the teacher's logits.
    """
    count, device = len(label), label.device
    forget_rows = forget[label].nonzero()[:, 0].cpu()
    first = torch.randint(count, (mixtures,), generator=generator)
    if len(forget_rows):
        chosen = torch.randint(len(forget_rows), (mixtures,), generator=generator)
        odd = torch.arange(mixtures) % 2 == 1
        first = torch.where(odd, forget_rows[chosen], first)
    second = torch.randint(count, (mixtures,), generator=generator)
    weight = torch.rand(mixtures, generator=generator)
    near, far = _REACH
    scale = torch.rand(mixtures, generator=generator).mul(math.log(far / near)).exp() * near
    if impressions:
        itself, one = torch.arange(count), torch.ones(count)
        first, second = torch.cat([itself, first]), torch.cat([itself, second])
        weight, scale = torch.cat([one, weight]), torch.cat([one, scale])
    mixing = FeatureMixup(
        first.to(device),
        second.to(device),
        weight.to(device),
        scale.to(device),
        tuple(f.mean(0) for f in features),
        tuple(not bool((f < 0).any()) for f in features),
    )
    total = len(first)
    if total * sum(f[0].numel() * f.element_size() for f in features) <= _KEPT:
        made = mixing(features, torch.arange(total, device=device))
        rows = label_features(tail, made, forget, names)
    else:
        rows = label_features(tail, features, forget, names, mixing)
    if impressions:
        rows.label[:count] = label
        rows.forgotten = forget[rows.label]
    return rows


def label_features(
    tail: nn.Module,
    features: tuple[Tensor, ...],
    forget: Tensor,
    names: Sequence[str] = (),
    mixing: FeatureMixup | None = None,
) -> FeatureSet:
    """Rows, with what the (still original) tail says of them and its top classes as labels.

    Args:
        tail, forget, names: as for `build_feature_set`.
        features: of the rows, each [N, ...]; or, with ``mixing``, what they are made of.
        mixing: see `FeatureSet`.
    """
    total = len(features[0]) if mixing is None else len(mixing.first)
    unknown = torch.empty(total, device=forget.device)
    teacher = torch.empty(total, 0, device=forget.device)
    rows = FeatureSet(features, teacher, unknown, unknown, mixing)
    _label(rows, tail, forget, names)
    rows.forgotten = forget[rows.label]
    return rows


@torch.no_grad()
def _label(rows: FeatureSet, tail: nn.Module, forget: Tensor, names: Sequence[str]) -> None:
    """Fills in what the original tail says of the rows: all its logits where they are few.

    Else what has to be known of them is taken from a tile at a time.
    """
    classes, device, total = len(forget), forget.device, len(rows)
    if not names and 4 * total * classes <= _KEPT_TEACHER:
        rows.teacher = torch.cat([tail(*rows.features_at(part)) for part in rows.chunks()])
        rows.label = rows.teacher.argmax(1)
        return
    rows.teacher = torch.empty(total, 0, device=device)
    rows.label = torch.zeros(total, dtype=torch.int64, device=device)
    rest = torch.full((total, 2), -torch.inf, device=device)
    moments = torch.zeros(2, dtype=torch.float64, device=device)
    for part in rows.chunks(min(classes, class_subset.TILE_CLASSES) if names else classes):
        features = rows.features_at(part)
        top = torch.full((len(part),), -torch.inf, device=device)
        tiles: Iterable[tuple[slice, Tensor]] = (
            class_subset.tiles(tail, names, classes, features) if names
            else [(slice(0, classes), tail(*features))]
        )  # fmt: skip
        for where, logits in tiles:
            value, at = logits.max(1)
            rows.label[part] = torch.where(value > top, at + where.start, rows.label[part])
            top = torch.maximum(top, value)
            moments += torch.stack([logits.sum(), logits.square().sum()])
            retained = logits.masked_fill(forget[where], -torch.inf)
            rest[part, 0] = torch.logaddexp(rest[part, 0], retained.logsumexp(1))
            rest[part, 1] = torch.maximum(rest[part, 1], retained.amax(1))
    mean, square = (moments / (total * classes)).tolist()
    rows.spread = math.sqrt(max(0.0, square - mean * mean))
    if names:
        rows.rest = rest
    else:
        rows.original = copy.deepcopy(tail).requires_grad_(False)

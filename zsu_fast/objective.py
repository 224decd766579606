"""What the tail is trained to do: the rows it learns from, and the two objectives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from . import ops
from .errors import ArgumentError, is_number

# Mixtures are this many times as far from the mean as the impressions they are made of.
_REACH = (0.5, 4.0)
# Rows that take more bytes than this are mixed when they are picked, not kept.
_KEPT = 128 * 1024**2
# Features that go through the tail at once where no gradient is needed.
_CHUNK = 32 * 1024**2


@dataclass(frozen=True)
class Mixing:
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
class Rows:
    """Training or held-out rows at the cut, each with the original model's answer.

    Attributes:
        features: the tensors that cross the cut, each [N, ...]; or, with ``mixing``, what the
            rows are made of when they are picked.
        teacher: the original tail's logits, float32 [N, C].
        label: int64 [N], the class of an impression, or the teacher's top class of a mixture.
        forgotten: bool [N], whether the label is to be forgotten.
        mixing: None where ``features`` are the rows.
    """

    features: tuple[Tensor, ...]
    teacher: Tensor
    label: Tensor
    forgotten: Tensor
    mixing: Mixing | None = None

    def __len__(self) -> int:
        return len(self.label)

    def pick(self, index: Tensor) -> Rows:
        """The rows at ``index``, int64 [n]."""
        return Rows(
            self._features(index),
            self.teacher.index_select(0, index),
            self.label.index_select(0, index),
            self.forgotten.index_select(0, index),
        )

    def chunks(self) -> Iterator[tuple[Tensor, ...]]:
        """The features of all rows, in order, in chunks of bounded size."""
        index = torch.arange(len(self), device=self.label.device)
        row = sum(f[0].numel() * f.element_size() for f in self.features)
        for part in index.split(max(1, min(1024, _CHUNK // row))):
            yield self._features(part)

    def _features(self, index: Tensor) -> tuple[Tensor, ...]:
        if self.mixing is not None:
            return self.mixing(self.features, index)
        return tuple(f.index_select(0, index) for f in self.features)


@dataclass(frozen=True)
class RowSettings:
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
        if margin is not None and (not is_number(margin) or margin < 0):
            raise ArgumentError("margin", f"got {margin!r}", "Pass a number that is 0 or more.")

    def count(self, impressions: int, classes: int) -> int:
        """Mixtures to make of so many impressions."""
        return max(2048, 4 * impressions, 12 * classes) if self.mixtures is None else self.mixtures

    def margin_for(self, logits: Tensor, label: Tensor, alone: bool = False) -> float:
        """The margin, from the original's logits [N, C] of impressions and their classes [N].

        Twice as far where forgotten logits move ``alone``: that costs the others nothing.
        """
        if self.margin is not None:
            return self.margin
        rival = logits.scatter(1, label[:, None], -torch.inf).amax(1)
        lead = float((logits.gather(1, label[:, None])[:, 0] - rival).mean())
        return (4 if alone else 2) * math.log10(max(10, logits.shape[1])) * max(0.0, lead)


def training_rows(
    tail: nn.Module,
    features: tuple[Tensor, ...],
    label: Tensor,
    forget: Tensor,
    settings: RowSettings,
    generator: torch.Generator,
    alone: bool = False,
) -> tuple[Rows, Rows, float]:
    """Rows to train on, rows to watch, and the margin.

    Those watched are made of other impressions where there are enough to hold some out, else they
    are other mixtures of the same.

    Args:
        tail, features, label, forget, generator: as for `make_rows`, of all impressions.
        settings: how many mixtures, and what margin.
        alone: whether only the forgotten logits are to move.
    """
    held = held_out(label)
    count = int((~held).sum())

    def rows(part: Tensor, mixtures: int, impressions: bool = True) -> Rows:
        chosen = tuple(f[part] for f in features)
        return make_rows(tail, chosen, label[part], forget, mixtures, generator, impressions)

    train = rows(~held, settings.count(count, len(forget)))
    if bool(held.any()):
        watched = rows(held, settings.count(int(held.sum()), 0))
    else:
        watched = rows(~held, max(1024, len(forget)), impressions=False)
    return train, watched, settings.margin_for(train.teacher[:count], train.label[:count], alone)


def held_out(label: Tensor) -> Tensor:
    """Which impressions are to be kept for the checks: one in four of each class, bool [N]."""
    held = torch.zeros(len(label), dtype=torch.bool, device=label.device)
    by_class = label.argsort(stable=True)
    start = torch.cat([label.new_zeros(1), torch.bincount(label).cumsum(0)])[label[by_class]]
    place = torch.arange(len(label), device=label.device) - start
    held[by_class] = place % 4 == 3
    return held


def make_rows(
    tail: nn.Module,
    features: tuple[Tensor, ...],
    label: Tensor,
    forget: Tensor,
    mixtures: int,
    generator: torch.Generator,
    impressions: bool = True,
) -> Rows:
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
    mixing = Mixing(
        first.to(device),
        second.to(device),
        weight.to(device),
        scale.to(device),
        tuple(f.mean(0) for f in features),
        tuple(not bool((f < 0).any()) for f in features),
    )
    total = len(first)
    rows = Rows(features, torch.empty(total, 0), torch.empty(total), torch.empty(total), mixing)
    if total * sum(f[0].numel() * f.element_size() for f in features) <= _KEPT:
        rows.features, rows.mixing = mixing(features, torch.arange(total, device=device)), None
    with torch.no_grad():
        rows.teacher = torch.cat([tail(*part) for part in rows.chunks()])
    rows.label = rows.teacher.argmax(1)
    if impressions:
        rows.label[:count] = label
    rows.forgotten = forget[rows.label]
    return rows


class Objective(Protocol):
    """A loss of the tail's logits on some rows, bounded below or watched by the loop."""

    name: str
    learning_rate: float | None  # None: in proportion to the size of the tail's weights

    def __call__(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The loss to descend on (scalar) and its gradient [N, C], in one pass over ``logits``.

        No autograd: the loop sends the gradient into the tail itself.
        """
        ...


class Differential:
    """Ascend on forget rows, descend on retain rows: ``-w_f * CE_forget + w_r * CE_retain``.

    The paper's section 4.3, with the signs of its prose (DESIGN section 4). Each term is a mean
    over its own rows. Unbounded below: it needs the loop's stop and rollback.
    """

    name = "differential"
    learning_rate: float | None = 1e-3

    def __init__(self, weight_forget: float = 0.9, weight_retain: float = 0.1) -> None:
        self.weight_forget, self.weight_retain = weight_forget, weight_retain

    def __call__(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        count = rows.forgotten.sum().clamp(1, max(1, len(rows) - 1))
        coef = torch.where(
            rows.forgotten, -self.weight_forget / count, self.weight_retain / (len(rows) - count)
        )
        losses, dlogits = ops.signed_cross_entropy_and_grad(logits, rows.label, coef)
        return losses.sum(), dlogits


class Masked:
    """Match the original model's softmax with the forgotten classes removed and renormalised.

    A KL divergence, so it cannot run away: 0 is the mask itself. A margin is added to the
    forgotten logits first, so that they end up lower by as much and stay below the others on
    images that are unlike the impressions.

    Args:
        forget: bool [C].
        margin: in logits.
        alone: let only the forgotten logits move. The others are right as they are; where each
            logit has weights of its own, a gradient on them would only carry what is peculiar to
            impressions into weights that real images need (SqueezeNet: RA 61 -> 45, with this
            62).
    """

    name = "masked"
    learning_rate: float | None = None

    def __init__(self, forget: Tensor, margin: float, alone: bool = False) -> None:
        self.forget, self.shift = forget, margin * forget.float()
        self.alone = alone

    def __call__(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        coef = torch.full((len(rows),), 1 / len(rows), device=logits.device)
        shifted = logits + self.shift
        loss, dlogits = ops.masked_cross_entropy_and_grad(shifted, rows.teacher, self.forget, coef)
        return loss, dlogits * self.forget if self.alone else dlogits

    def divergence(self, logits: Tensor, rows: Rows) -> Tensor:
        """Mean KL from the masked original to ``logits``, margin included, in nats.

        Differentiable, unlike a call.
        """
        coef = torch.full((len(rows),), 1 / len(rows), device=logits.device)
        return ops.masked_cross_entropy(logits + self.shift, rows.teacher, self.forget, coef)


def check_objective(name: str, weights: Sequence[float]) -> None:
    """Raises where `make_objective` could not make one of these.

    Raises:
        ArgumentError: no such objective, or weights that are not two positive numbers.
    """
    try:
        weight_forget, weight_retain = (float(w) for w in weights)
        good = 0 < weight_forget < math.inf and 0 < weight_retain < math.inf
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ArgumentError("weights", f"got {weights!r}", "Pass two positive numbers (w_f, w_r).")
    if not isinstance(name, str) or name not in ("masked", "differential"):
        raise ArgumentError("objective", f"got {name!r}", "Pass 'masked' or 'differential'.")


def make_objective(name: str, weights: Sequence[float], yardstick: Masked) -> Objective:
    """The objective called ``name``: "masked" is the yardstick itself.

    Args:
        name: "masked" or "differential".
        weights: (w_f, w_r) of the differential one.
        yardstick: by which the held-out rows are scored, whatever the objective.

    Raises:
        ArgumentError: as `check_objective`.
    """
    check_objective(name, weights)
    return yardstick if name == "masked" else Differential(*weights)

"""What the tail is trained to do: the rows it learns from, and the two objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from . import ops
from .errors import ArgumentError, is_number

# Mixtures are this many times as far from the mean as the impressions they are made of.
_REACH = (0.5, 4.0)


@dataclass
class Rows:
    """Training or held-out rows at the cut, each with the original model's answer.

    Attributes:
        features: the tensors that cross the cut, each [N, ...].
        teacher: the original tail's logits, float32 [N, C].
        label: int64 [N], the class of an impression, or the teacher's top class of a mixture.
        forgotten: bool [N], whether the label is to be forgotten.
    """

    features: tuple[Tensor, ...]
    teacher: Tensor
    label: Tensor
    forgotten: Tensor

    def __len__(self) -> int:
        return len(self.label)

    def pick(self, index: Tensor) -> Rows:
        """The rows at ``index``, int64 [n]."""
        return Rows(
            tuple(f.index_select(0, index) for f in self.features),
            self.teacher.index_select(0, index),
            self.label.index_select(0, index),
            self.forgotten.index_select(0, index),
        )


@dataclass(frozen=True)
class RowSettings:
    """What the tail is shown beside the impressions, and how far it has to go.

    Attributes:
        mixtures: rows mixed from impressions; None for four an impression, at least 2,048.
        margin: how far, in logits, forgotten ones are pushed below what the mask asks for; None
            for twice the mean lead of the impressions.

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

    def count(self, impressions: int) -> int:
        """Mixtures to make of so many impressions."""
        return max(2048, 4 * impressions) if self.mixtures is None else self.mixtures

    def margin_for(self, rows: Rows, impressions: int) -> float:
        """The margin; the first rows are ``impressions`` and carry the original's logits."""
        if self.margin is not None:
            return self.margin
        logits, label = rows.teacher[:impressions], rows.label[:impressions, None]
        rival = logits.scatter(1, label, -torch.inf).amax(1)
        return 2 * max(0.0, float((logits.gather(1, label)[:, 0] - rival).mean()))


def make_rows(
    tail: nn.Module,
    features: tuple[Tensor, ...],
    label: Tensor,
    forget: Tensor,
    mixtures: int,
    generator: torch.Generator,
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
    """
    if mixtures and len(label):
        device = label.device
        forget_rows = forget[label].nonzero()[:, 0].cpu()
        first = torch.randint(len(label), (mixtures,), generator=generator)
        if len(forget_rows):
            chosen = torch.randint(len(forget_rows), (mixtures,), generator=generator)
            odd = torch.arange(mixtures) % 2 == 1
            first = torch.where(odd, forget_rows[chosen], first)
        second = torch.randint(len(label), (mixtures,), generator=generator)
        weight = torch.rand(mixtures, generator=generator).to(device)
        near, far = _REACH
        scale = torch.rand(mixtures, generator=generator).mul(math.log(far / near)).exp() * near
        scale = scale.to(device)
        first, second = first.to(device), second.to(device)

        def mix(f: Tensor) -> Tensor:
            shape = (-1, *[1] * (f.ndim - 1))
            w, s = weight.view(shape), scale.view(shape)
            mean = f.mean(0)
            mixed = mean + s * (w * f[first] + (1 - w) * f[second] - mean)
            if not bool((f < 0).any()):
                mixed = mixed.clamp(min=0)
            return torch.cat([f, mixed])

        features = tuple(mix(f) for f in features)
    with torch.no_grad():
        parts = zip(*[f.split(1024) for f in features], strict=True)
        teacher = torch.cat([tail(*part) for part in parts])
    label = torch.cat([label, teacher[len(label) :].argmax(1)])
    return Rows(features, teacher, label, forget[label])


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
    """

    name = "masked"
    learning_rate: float | None = None

    def __init__(self, forget: Tensor, margin: float) -> None:
        self.forget, self.shift = forget, margin * forget.float()

    def __call__(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        coef = torch.full((len(rows),), 1 / len(rows), device=logits.device)
        shifted = logits + self.shift
        return ops.masked_cross_entropy_and_grad(shifted, rows.teacher, self.forget, coef)

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
    if name not in ("masked", "differential"):
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

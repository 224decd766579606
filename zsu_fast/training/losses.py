"""The two objectives: signed cross-entropy and masked KL divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ArgumentError
from .features import FeatureSet


class Objective(Protocol):
    """A loss of the tail's logits on some rows, bounded below or validated by the loop."""

    name: str
    learning_rate: float | None  # None: in proportion to the size of the tail's weights

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
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

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        count = rows.forgotten.sum().clamp(1, max(1, len(rows) - 1))
        coef = torch.where(
            rows.forgotten, -self.weight_forget / count, self.weight_retain / (len(rows) - count)
        )
        losses, dlogits = ops.signed_cross_entropy_and_grad(logits, rows.label, coef)
        return losses.sum(), dlogits


class MaskedKL:
    """Match the original model's softmax with the forgotten classes removed and renormalised.

    A KL divergence, so it cannot run away: 0 is the mask itself. A margin is added to the
    forgotten logits first, so that they end up lower by as much and stay below the others on
    images that are unlike the impressions.

    Args:
        forget: bool [C].
        margin: in logits.
        forget_logits_only: let only the forgotten logits move. The others are right as they are; where each
            logit has weights of its own, a gradient on them would only carry what is peculiar to
            impressions into weights that real images need (SqueezeNet: RA 61 -> 45, with this
            62).
    """

    name = "masked"
    learning_rate: float | None = None

    def __init__(self, forget: Tensor, margin: float, forget_logits_only: bool = False) -> None:
        self.forget, self.shift = forget, margin * forget.float()
        self.forget_logits_only = forget_logits_only

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        coef = torch.full((len(rows),), 1 / len(rows), device=logits.device)
        shifted = logits + self.shift
        loss, dlogits = ops.masked_cross_entropy_and_grad(shifted, rows.teacher, self.forget, coef)
        return loss, dlogits * self.forget if self.forget_logits_only else dlogits

    @torch.no_grad()
    def score(self, tail: nn.Module, rows: FeatureSet) -> tuple[float, float, float]:
        """How ``tail`` does on ``rows``: (divergence, leak, agreement), see `loop.ValidationResult`.

        The divergence is NaN where a logit is not finite.
        """
        divergence = leaks = agree = torch.zeros((), device=self.forget.device)
        for index in rows.chunks(len(self.forget)):
            part = rows.select(index)
            logits = tail(*part.features)
            bad = torch.where(logits.isfinite().all(), 0.0, torch.nan)
            divergence = divergence + len(index) * (self.divergence(logits, part) + bad)
            leaked, same = self._answers(logits, part)
            leaks = leaks + leaked.sum()
            agree = agree + (same & ~part.forgotten).sum()
        kept = int((~rows.forgotten).sum())
        agreement = float(agree) / kept if kept else 1.0
        return float(divergence) / len(rows), float(leaks) / len(rows), agreement

    def _answers(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        """Whether each row is answered with a forgotten class, and as by the masked original."""
        answer = logits.argmax(1)
        masked = rows.teacher.masked_fill(self.forget, -torch.inf).argmax(1)
        return self.forget[answer], answer == masked

    def divergence(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        """Mean KL from the masked original to ``logits``, margin included, in nats.

        Differentiable, unlike a call.
        """
        coef = torch.full((len(rows),), 1 / len(rows), device=logits.device)
        return ops.masked_cross_entropy(logits + self.shift, rows.teacher, self.forget, coef)


class ForgetOnlyKL(MaskedKL):
    """`MaskedKL` with ``forget_logits_only``, from the forgotten logits and two numbers a row.

    The retained logits are the original's, so that all they do in the loss is to add up: their
    logsumexp stands for them as one more logit, and loss and gradient are the same as ever. No
    tensor has a column a class, however many there are.

    Logits are float32 [N, F] here, those of the forgotten classes in order.
    """

    def __init__(self, forget: Tensor, margin: float) -> None:
        super().__init__(forget, margin, forget_logits_only=True)
        gone = int(forget.sum())
        self.last = torch.arange(gone + 1, device=forget.device) == gone
        self.margin = margin

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        every, coef = self._joined(logits, rows)
        loss, dlogits = ops.masked_cross_entropy_and_grad(every, every, ~self.last, coef)
        return loss, dlogits[:, :-1]

    def divergence(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        every, coef = self._joined(logits, rows)
        return ops.masked_cross_entropy(every, every.detach(), ~self.last, coef)

    def _joined(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        """Logits with the margin and, as the last column, what stands for the retained ones."""
        assert rows.rest is not None
        coef = torch.full((len(rows),), 1 / len(rows), device=logits.device)
        return torch.cat([logits + self.margin, rows.rest[:, :1]], 1), coef

    def _answers(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        assert rows.rest is not None
        leaked = logits.amax(1) > rows.rest[:, 1]
        return leaked, ~leaked  # the best of the retained is who it was


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


def make_objective(name: str, weights: Sequence[float], validation_loss: MaskedKL) -> Objective:
    """The objective called ``name``: "masked" is the validation loss itself.

    Args:
        name: "masked" or "differential".
        weights: (w_f, w_r) of the differential one.
        validation_loss: by which the held-out rows are scored, whatever the objective.

    Raises:
        ArgumentError: as `check_objective`.
    """
    check_objective(name, weights)
    return validation_loss if name == "masked" else Differential(*weights)

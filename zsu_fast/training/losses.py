"""The two objectives: signed cross-entropy and masked KL divergence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..errors import ArgumentError
from ..models.multi_label import predicted, same_decisions
from .features import FeatureSet

ObjectiveName = Literal["masked", "differential"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
_KEEP = 8.0  # of `MultiLabelKL`, as `DeepSettings.keep`
STATISTICS = 4 * 1024**2  # logits whose statistics are taken at once


class Objective(ABC):
    """A training loss; by default a function of the tail's logits, with a fused gradient.

    Attributes:
        learning_rate: None for one in proportion to the size of the trained weights.
        copies_teacher: whether `gradients` needs the teacher's logits of a batch in a tensor of
            their own; else rows may have `FeatureSet.teacher_index`.
    """

    learning_rate: float | None = None
    copies_teacher = True

    @abstractmethod
    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        """Returns the loss, a scalar, and its gradient [N, C], in one pass and without autograd."""

    def gradients(
        self, tail: nn.Module, parameters: Sequence[nn.Parameter], rows: FeatureSet
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Returns the loss of ``rows``, a scalar, and its gradient for each parameter."""
        if type(tail) is nn.Linear:
            return self._linear_gradients(tail, parameters, rows)
        logits = tail(*rows.features)
        loss, dlogits = self(logits.detach(), rows)
        return loss, torch.autograd.grad(logits, list(parameters), dlogits)

    def _linear_gradients(
        self, layer: nn.Linear, parameters: Sequence[nn.Parameter], rows: FeatureSet
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """`gradients` without autograd, which takes as long as a small layer itself."""
        (x,) = rows.features
        with torch.no_grad():
            logits = layer(x)
        loss, dlogits = self(logits, rows)
        return loss, [dlogits.T @ x if p is layer.weight else dlogits.sum(0) for p in parameters]


class Differential(Objective):
    """Signed cross-entropy: ``-w_f * CE_forget + w_r * CE_retain``, each a mean over its own rows.

    Section 4.3 of the paper, with the signs of its prose: ascend on the forgotten classes, descend
    on the retained ones. It is unbounded below, so it needs the loop's stop and rollback.
    """

    learning_rate: float | None = 1e-3
    copies_teacher = False

    def __init__(self, weight_forget: float = 0.9, weight_retain: float = 0.1) -> None:
        self.weight_forget, self.weight_retain = weight_forget, weight_retain

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        count = rows.forgotten.sum().clamp(1, max(1, len(rows) - 1))
        coef = torch.where(
            rows.forgotten, -self.weight_forget / count, self.weight_retain / (len(rows) - count)
        )
        losses, dlogits = ops.signed_cross_entropy_and_grad(logits, rows.label, coef)
        return losses.sum(), dlogits


class MaskedKL(Objective):
    """KL divergence from the teacher's softmax without the forgotten classes, renormalised.

    It is bounded below: 0 is the mask itself. The margin is added to the forgotten logits first,
    so that training pushes them lower by as much and they stay below the others on images unlike
    the impressions.

    Args:
        forget: bool [C].
        margin: in logits.
        forget_logits_only: train only the forgotten logits. The retained ones are right as they
            are; if each logit has weights of its own, a gradient on them would only carry the
            peculiarities of impressions into weights that real images need (SqueezeNet: RA falls
            from 61 to 45; with this it is 62).
        keep: weight of ``mean((1 - p_f) * (z'_r - z_r)^2) / mean(z_r^2)``, with p_f the teacher's
            probability of forgotten classes, z_r its retained logits, centred per row in the
            denominator, and z'_r those that are trained. A softmax does not see a shift of all
            logits, but sigmoids, thresholds and energy scores do.
        keep_all: leave out the factor 1 - p_f, for a layer on fixed features, which can keep them
            on all rows. Deeper, FA would rise: what lowers a class raises the others beside it.
    """

    copies_teacher = False

    def __init__(
        self,
        forget: Tensor,
        margin: float,
        forget_logits_only: bool = False,
        keep: float = 0.0,
        keep_all: bool = False,
    ) -> None:
        self.forget, self.margin = forget, margin
        self.forget_logits_only, self.keep, self.keep_all = forget_logits_only, keep, keep_all
        self._shares: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        return ops.masked_cross_entropy_and_grad(
            logits, rows.teacher, self.forget, mean_weights(rows), index=rows.teacher_index,
            keep=self._keep_weights(rows) if self.keep else None, shift=self.margin,
            forget_only=self.forget_logits_only,
        )  # fmt: skip

    def _keep_weights(self, rows: FeatureSet) -> Tensor:
        """Weights of the rows' squared changes of retained logits, [N]."""
        if self._shares is None or self._shares[0] is not rows.teacher:
            self._shares = (rows.teacher, *self._row_shares(rows.teacher))
        _, size, seen = self._shares
        if rows.teacher_index is not None:
            size, seen = (t.index_select(0, rows.teacher_index) for t in (size, seen))
        return self.keep * seen / size.sum().clamp(min=1e-12)

    def _row_shares(self, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Per row [N]: sum of squares of the centred retained logits, and 1 - p_f or 1."""
        retained = (~self.forget).float()
        sizes, seen = [], []
        for part in teacher.split(max(1, STATISTICS // teacher.shape[1])):
            mean = (part * retained).sum(1, keepdim=True) / retained.sum()
            sizes.append(((part - mean).square() * retained).sum(1))
            share = torch.ones_like(sizes[-1])
            seen.append(share if self.keep_all else share - part.softmax(1)[:, self.forget].sum(1))
        return torch.cat(sizes), torch.cat(seen)

    @torch.no_grad()
    def score(self, tail: nn.Module, rows: FeatureSet) -> tuple[float, float, float, float]:
        """Divergence (NaN if a logit is not finite), leak, agreement, forgotten leak: see
        `ValidationResult`.
        """
        divergence = leaks = agree = counted = torch.zeros((), device=self.forget.device)
        leaks_of_forgotten = leaks
        for part in rows.parts(len(self.forget)):
            logits = tail(*part.features)
            bad = torch.where(logits.isfinite().all(), 0.0, torch.nan)
            divergence = divergence + len(part) * (self.divergence(logits, part) + bad)
            leaked, same = self.answers(logits, part)
            may_leak = self.may_leak(part)
            leaks, counted = leaks + (leaked & may_leak).sum(), counted + may_leak.sum()
            leaks_of_forgotten = leaks_of_forgotten + (leaked & part.forgotten).sum()
            agree = agree + (same * ~part.forgotten).sum()
        forgotten = int(rows.forgotten.sum())
        retained = len(rows) - forgotten
        return (
            float(divergence) / len(rows),
            float(leaks) / max(1, int(counted)),
            float(agree) / retained if retained else 1.0,
            float(leaks_of_forgotten) / forgotten if forgotten else math.nan,
        )

    def may_leak(self, rows: FeatureSet) -> Tensor:
        """The rows that the leak is a share of, bool [N]: all of them."""
        return torch.ones_like(rows.forgotten)

    def answers(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        """Whether each row's top class is forgotten, and whether it is the masked teacher's."""
        answer = logits.argmax(1)
        masked = rows.teacher.masked_fill(self.forget, -torch.inf).argmax(1)
        return self.forget[answer], answer == masked

    def divergence(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        """Mean KL from the masked teacher to ``logits``, margin included, in nats.

        Differentiable, unlike a call.
        """
        return ops.masked_cross_entropy(
            logits, rows.teacher, self.forget, mean_weights(rows), index=rows.teacher_index,
            shift=self.margin,
        )  # fmt: skip


class MultiLabelKL(MaskedKL):
    """`MaskedKL` for one sigmoid per class, where a forgotten class is to be absent everywhere.

    With z the teacher's logits, z' those of a batch, and p* = sigmoid(z) for a retained class and 0
    for a forgotten one, the loss is::

        mean over rows of sum over classes of KL(Bernoulli(p*) || Bernoulli(sigmoid(z' + margin)))
        + keep * |z'_r - z_r|^2 / |z_r|^2
        + keep * var(z'_f) / var(z_f)              with ``constant``

    where the margin is added to forgotten logits only. The second term counts where sigmoids are
    flat. The third makes the forgotten logits constant: if they are low but still rank images by
    the class, a lower threshold brings it back. It needs features that have forgotten the class,
    otherwise the last layer can't do without ranking it, and the logits stay higher: with
    ``depth="output"`` it raises FA from 0 to 12 % on pairs of CIFAR-10 images.

    Attributes:
        constant: whether there is the third term.
    """

    constant = False
    copies_teacher = True

    @property
    def shift(self) -> Tensor:
        """What is added to each logit, [C]."""
        return self.margin * self.forget.float()

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        change, size = self._change(logits, rows)
        dlogits = ((logits + self.shift).sigmoid() - self._target(rows)) / len(rows)
        dlogits = dlogits + 2 * self._weights() * change / size
        loss = self.divergence(logits, rows)
        return loss, dlogits * self.forget if self.forget_logits_only else dlogits

    def may_leak(self, rows: FeatureSet) -> Tensor:
        """The rows in which the teacher predicts a forgotten class."""
        return rows.forgotten

    def answers(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        """Whether each row has a forgotten class, and the share of its retained decisions that are
        the teacher's. Those for and against a class weigh the same, whatever their number.
        """
        same = same_decisions(logits, rows.teacher, ~self.forget)
        return (predicted(logits) & self.forget).any(1), same

    def divergence(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        target = self._target(rows)
        cross = F.binary_cross_entropy_with_logits(logits + self.shift, target, reduction="none")
        entropy = F.binary_cross_entropy_with_logits(rows.teacher, target, reduction="none")
        kl = (cross - entropy.masked_fill(self.forget, 0)).sum() / len(rows)
        change, size = self._change(logits, rows)
        total: Tensor = kl + (self._weights() * change.square() / size).sum()
        return total

    def _weights(self) -> Tensor:
        """Of the squared changes of each class, [C]."""
        return torch.where(self.forget, _KEEP if self.constant else 0.0, _KEEP)

    def _target(self, rows: FeatureSet) -> Tensor:
        """The probabilities of the masked teacher, [N, C]."""
        return rows.teacher.sigmoid() * ~self.forget

    def _change(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        """What is to be 0: the change of a retained logit, and by how much a forgotten one differs
        from its mean over the rows, [N, C]; and the squared sizes to compare it with, [C].
        """
        forget, teacher = self.forget, rows.teacher
        change = torch.where(forget, logits - logits.mean(0), logits - teacher)
        squares = torch.where(forget, teacher - teacher.mean(0), teacher).square().sum(0)
        retained, forgotten = (squares * ~forget).sum(), (squares * forget).sum()
        return change, torch.where(forget, forgotten, retained).clamp(min=1e-12)


class ForgetOnlyKL(MaskedKL):
    """`MaskedKL` with ``forget_logits_only``, from the forgotten logits and two numbers per row.

    The retained logits are fixed, so their logsumexp can stand in for them as a single extra logit
    without changing loss or gradient. No tensor has a column per class.

    Logits are float32 [N, F], those of the forgotten classes in order.
    """

    def __init__(self, forget: Tensor, margin: float) -> None:
        super().__init__(forget, margin, forget_logits_only=True)
        count = int(forget.sum())
        self.is_forgotten = torch.arange(count + 1, device=forget.device) < count

    def __call__(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        joined = self._joined(logits, rows)
        loss, dlogits = ops.masked_cross_entropy_and_grad(
            joined, joined, self.is_forgotten, mean_weights(rows), shift=self.margin
        )
        return loss, dlogits[:, :-1]

    def divergence(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        joined = self._joined(logits, rows)
        return ops.masked_cross_entropy(
            joined, joined.detach(), self.is_forgotten, mean_weights(rows), shift=self.margin
        )

    def _joined(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        """The forgotten logits and the one that stands for the retained ones, [N, F + 1]."""
        assert rows.retained is not None
        return torch.cat([logits, rows.retained.logsumexp[:, None]], 1)

    def answers(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        assert rows.retained is not None
        leaked = logits.amax(1) > rows.retained.max
        return leaked, ~leaked  # the top retained class never changes


def mean_weights(rows: FeatureSet) -> Tensor:
    """The weight of each row in a mean over them, [N]."""
    return torch.full((len(rows),), 1 / len(rows), device=rows.label.device)


@dataclass(frozen=True)
class ObjectiveSettings:
    """Which objective the tail is trained on.

    Attributes:
        name: "masked" (`MaskedKL`) or "differential" (`Differential`).
        weights: (w_f, w_r) of the differential objective.
        multi_label: whether each class has a sigmoid of its own (`MultiLabelKL`).
        constant: see `MultiLabelKL`.

    Raises:
        ArgumentError: no such objective, weights that are not two positive numbers, or the
            differential objective of a multi-label model.
    """

    name: ObjectiveName = "masked"
    weights: tuple[float, float] = (0.9, 0.1)
    multi_label: bool = False
    constant: bool = False

    def __post_init__(self) -> None:
        try:
            weight_forget, weight_retain = (float(w) for w in self.weights)
            good = 0 < weight_forget < math.inf and 0 < weight_retain < math.inf
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ArgumentError(
                "weights", f"got {self.weights!r}", "Pass two positive numbers (w_f, w_r)."
            )
        if not isinstance(self.name, str) or self.name not in OBJECTIVES:
            raise ArgumentError(
                "objective", f"got {self.name!r}", "Pass 'masked' or 'differential'."
            )
        if self.multi_label and self.name == "differential":
            raise ArgumentError(
                "objective",
                "got 'differential' for a multi-label model: its cross-entropy is that of a "
                "softmax",
                "Leave objective out, or pass multi_label=False if its classes exclude each other.",
            )

    def make(self, validation_loss: MaskedKL) -> Objective:
        """Returns the objective; "masked" is ``validation_loss`` itself."""
        return validation_loss if self.name == "masked" else Differential(*map(float, self.weights))

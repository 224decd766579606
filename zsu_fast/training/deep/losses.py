"""The loss of deep forgetting."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..features import FeatureSet
from ..losses import MaskedKL, MultiLabelKL
from .settings import DeepSettings
from .tail import FrozenClassifierTail, TailOutputs

_MEASURED = 2048  # training rows that explained variance is measured on
_MINUS_INFINITY = -1e4  # a bias below all logits
# Fraction of the room above a floor to use: pushing all the way down hurts the retained classes.
USABLE_ROOM = 0.5


@torch.no_grad()
def room_above_floor(tail: FrozenClassifierTail, rows: FeatureSet, forget: Tensor) -> float:
    """Returns the margin that 19 of 20 rows can meet without raising a retained logit.

    It is infinite unless logits have a lower bound, such as from a ReLU after the last layer
    (SqueezeNet). There, a larger margin could only be met by raising all retained logits: retained
    classes would suffer, and none would be forgotten any better. Call it before training.
    """
    bias = getattr(tail.last, "bias", None)
    if not isinstance(bias, nn.Parameter) or bias.shape != forget.shape:
        return math.inf
    sample = torch.arange(0, len(rows), max(1, len(rows) // 2048), device=forget.device)
    saved = bias.detach().clone()
    rooms = []
    try:
        bias[forget] = _MINUS_INFINITY
        for index in sample.split(256):
            part = rows.select(index)
            floor = tail.tail(*part.features)[:, forget].logsumexp(1)
            rooms.append(part.teacher[:, ~forget].logsumexp(1) - floor)
    finally:
        bias.copy_(saved)
    room = float(torch.cat(rooms).quantile(0.05))
    return max(0.0, room) if room < -_MINUS_INFINITY / 2 else math.inf


def masked_confidence(logits: Tensor, forget: Tensor) -> Tensor:
    """The highest probability of a retained class, given that it is one of them; [N, C] -> [N]."""
    return logits.masked_fill(forget, -torch.inf).softmax(1).amax(1)


class DeepObjective(MaskedKL):
    """`MaskedKL` with more terms: the training loss of deep forgetting, and its validation.

    With z the original logits, z' those of the frozen original last layer on the tail's features h,
    and p_f the original probability of the forgotten classes, the loss of a batch is::

        KL(masked teacher || z' + margin)
        + keep * mean((1 - p_f) * (z'_r - z_r)^2) / mean(z_r^2)
        + constant * var(z'_f) / var(z_f)
        + erase * R2(h)

    1. The original last layer on the new features matches the masked original: put back (the
       un-mask test), it brings no forgotten class back.
    2. The retained logits z_r, centred per row, keep their values where the original did not see a
       forgotten class: KL alone would let confidence drift.
    3. The forgotten logits z_f, less the row's mean retained logit, become constant over the
       scenes: else they would still tell forgotten classes from each other, only lower.
    4. R2 is the share of the original forgotten logits' variance that a ridge regression on the
       features, fitted on the scenes of the batch, explains: little is left for a linear probe.
       Belrose et al., "LEACE", 2023, bring it to 0 in closed form; here the layers learn to.

    Args:
        tail: the trained tail.
        rows: training rows, which give mean(z_r^2).
        forget: bool [C].
        margin: in logits.
        settings: the weights.
    """

    copies_teacher = True

    def __init__(
        self,
        tail: FrozenClassifierTail,
        rows: FeatureSet,
        forget: Tensor,
        margin: float,
        settings: DeepSettings,
    ) -> None:
        super().__init__(forget, margin)
        self.tail, self.settings = tail, settings
        self.retained = (~forget).nonzero()[:, 0]
        self.size = self._retained(rows.teacher).square().mean().clamp(min=1e-12)

    def gradients(
        self, tail: nn.Module, parameters: Sequence[nn.Parameter], rows: FeatureSet
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Returns the loss of ``rows`` and its gradients; None for an unused parameter."""
        loss = self.loss(tail(*rows.features), rows)
        return loss.detach(), torch.autograd.grad(loss, list(parameters), allow_unused=True)

    def loss(self, outputs: TailOutputs, rows: FeatureSet) -> Tensor:
        """The loss of a batch, differentiable."""
        s = self.settings
        change = self._kept_change(outputs.logits, rows)
        kept = (self._keep_weight(rows) * change.square().mean(1)).mean() / self.size
        loss = self.divergence(outputs.logits, rows) + s.keep * kept
        if s.constant and not s.multi_label:  # `MultiLabelKL` has such a term itself
            loss = loss + s.constant * self._variation(outputs.logits, rows)
        if s.erase:
            loss = loss + s.erase * self.explained_variance(outputs.features, rows)
        return loss

    def _keep_weight(self, rows: FeatureSet) -> Tensor:
        """How much the retained logits of each row are to keep their values, [N]."""
        return 1 - rows.teacher.softmax(1)[:, self.forget].sum(1)

    def _forgotten(self, rows: FeatureSet) -> Tensor:
        """What a probe of the forgotten classes would predict, [N, F]."""
        return rows.teacher[:, self.forget] - rows.teacher.mean(1, keepdim=True)

    def _retained(self, logits: Tensor) -> Tensor:
        """The retained logits, centred per row."""
        retained = logits.index_select(1, self.retained)
        return retained - retained.mean(1, keepdim=True)

    def _kept_change(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        """The change of the retained logits, centred per row, [N, R]."""
        return self._retained(logits) - self._retained(rows.teacher)

    def _variation(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        """Variance of the forgotten logits over the scenes, as a share of the original one."""
        now, original = (
            _centred(x[:, self.forget] - x[:, self.retained].mean(1, keepdim=True), rows)
            for x in (logits, rows.teacher)
        )
        return now.square().sum() / original.square().sum().clamp(min=1e-12)

    def explained_variance(self, features: Tensor, rows: FeatureSet) -> Tensor:
        """Share of the forgotten logits' variance that ridge regression on ``features`` explains.

        It is fitted on the scenes among ``rows``. In the dual form, whose linear system is as large
        as the batch however wide the features, [N, ...], are.
        """
        target = _centred(self._forgotten(rows), rows)
        deviation = (target.square().sum(0) / _weight(rows).sum().clamp(min=1)).sqrt()
        target = target / deviation.clamp(min=1e-6)
        x = _centred(features.flatten(1), rows)
        gram = x @ x.T
        ridge = self.settings.ridge * gram.diagonal().sum() / x.shape[1] + 1e-12
        damped = gram + ridge * torch.eye(len(x), device=gram.device)
        explained: Tensor = (target * (gram @ torch.linalg.solve(damped, target))).sum()
        return explained / target.square().sum().clamp(min=1e-12)

    @torch.no_grad()
    def evidence(self, train: FeatureSet) -> float:
        """Explained variance of the forgotten logits on up to 2,048 training rows."""
        sample = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        rows = train.select(sample[:_MEASURED].to(train.label.device))
        features = torch.cat([part.features for part in self.tail.chunks(rows)])
        return float(self.explained_variance(features, rows))

    @torch.no_grad()
    def score(self, _tail: nn.Module, rows: FeatureSet) -> tuple[float, float, float, float]:
        logits = torch.cat([part.logits for part in self.tail.chunks(rows)])
        finite = bool(logits.isfinite().all())
        divergence = float(self.divergence(logits, rows)) if finite else math.nan
        leaked, same = self.answers(logits, rows)
        counted, of_forgotten = leaked[self.may_leak(rows)], leaked[rows.forgotten]
        leak = float(counted.float().mean()) if len(counted) else 0.0
        forgotten_leak = float(of_forgotten.float().mean()) if len(of_forgotten) else math.nan
        retained = ~rows.forgotten
        agreement = float(same[retained].float().mean()) if bool(retained.any()) else 1.0
        return divergence, leak, agreement, forgotten_leak

    def confidence(self, rows: FeatureSet) -> Tensor:
        """The masked teacher's confidence in each of its answers, [N]."""
        return masked_confidence(rows.teacher, self.forget)

    def unmasked_agreement(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        """For each row, to what extent its retained answer is the teacher's, 0..1 or bool [N].

        Unlike the answer of `answers`, this one takes no notice of the forgotten logits.
        """
        now, before = (x.masked_fill(self.forget, -torch.inf) for x in (logits, rows.teacher))
        return now.argmax(1) == before.argmax(1)


class MultiLabelDeepObjective(MultiLabelKL, DeepObjective):
    """`DeepObjective` for one sigmoid per class: `MultiLabelKL` in place of the softmaxes' KL.

    The retained logits keep their absolute values, also where the original sees a forgotten class:
    an image of both has to keep the other one.
    """

    constant = True

    def _keep_weight(self, rows: FeatureSet) -> Tensor:
        return torch.ones_like(rows.teacher[:, 0])

    def _forgotten(self, rows: FeatureSet) -> Tensor:
        return rows.teacher[:, self.forget]

    def _retained(self, logits: Tensor) -> Tensor:
        return logits.index_select(1, self.retained)

    def confidence(self, rows: FeatureSet) -> Tensor:
        """1 for each row: its answers are many."""
        return torch.ones_like(rows.teacher[:, 0])

    def unmasked_agreement(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        return self.answers(logits, rows)[1]


def _weight(rows: FeatureSet) -> Tensor:
    """1 for a scene, else 0; [N, 1]."""
    return torch.ones_like(rows.teacher[:, :1]) if rows.scene is None else rows.scene[:, None]


def _centred(x: Tensor, rows: FeatureSet) -> Tensor:
    """``x``, [N, D], less its mean over the scenes; 0 where a row is not a scene."""
    weight = _weight(rows)
    return weight * (x - (weight * x).sum(0) / weight.sum().clamp(min=1))

"""The loss of deep forgetting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ..features import FeatureSet
from ..losses import STATISTICS, MaskedKL, MultiLabelKL, mean_weights
from .null_space import NullSpace
from .settings import DeepSettings
from .tail import FrozenClassifierTail, TailOutputs

_MEASURED = 2048  # training rows that explained variance is measured on
_LEAST_SHARE = 0.4  # of the features' variance in the null space: an original ResNet-20 has 0.5
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


class RowConstants(NamedTuple):
    """What the teacher's logits z of N rows decide for every batch that they are in."""

    mean: Tensor  # float32 [N], of the retained logits
    weight: Tensor  # float32 [N], how much the retained logits are to keep their values
    contrast: Tensor  # float32 [N, F], the forgotten logits less that mean
    target: Tensor  # float32 [N, F], what a probe of the forgotten classes would predict


class DeepObjective(MaskedKL):
    """`MaskedKL` with more terms: the training loss of deep forgetting, and its validation.

    With z the original logits, z' those of the frozen original last layer on the tail's features h,
    and p_f the original probability of the forgotten classes, the loss of a batch is::

        KL(masked teacher || z' + margin)
        + keep * mean((1 - p_f) * (z'_r - z_r)^2) / mean(z_r^2)
        + constant * var(z'_f) / var(z_f)
        + erase * R2(h)
        + null_space * var(P h) / var(h_0)

    1. The original last layer on the new features matches the masked original: put back (the
       un-mask test), it brings no forgotten class back.
    2. The retained logits z_r, centred per row, keep their values where the original did not see a
       forgotten class: KL alone would let confidence drift.
    3. The forgotten logits z_f, less the row's mean retained logit, become constant over the
       scenes: else they would still tell forgotten classes from each other, only lower.
    4. R2 is the share of the original forgotten logits' variance that a ridge regression on the
       features, fitted on the scenes of the batch, explains: little is left for a linear probe.
       Belrose et al., "LEACE", 2023, bring it to 0 in closed form; here the layers learn to. With
       ``components``, as many principal components of the original's features in the null space of
       the retained classes (`NullSpace`) are erased, too.
    5. The features' part P h in that null space becomes constant over the scenes.

    Args:
        tail: the trained tail.
        rows: training rows, which give mean(z_r^2).
        forget: bool [C].
        margin: in logits.
        settings: the weights.
    """

    copies_teacher = False

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
        self.retained, self.forgotten = (~forget).nonzero()[:, 0], forget.nonzero()[:, 0]
        self.mean_retained = (~forget) / len(self.retained)  # times logits [N, C]: their mean
        self.size = self._retained(rows.teacher).square().mean().clamp(min=1e-12)
        self._constants: tuple[Tensor, RowConstants] | None = None
        self.null_space = self._null_space(rows) if settings.null_space else None

    @property
    def null_space_treatment(self) -> str:
        """What the loss does with the null space: "erased", "held", or "free"."""
        if self.null_space is None:
            return "free"
        return "erased" if self.settings.components else "held"

    @torch.no_grad()
    def _null_space(self, rows: FeatureSet) -> NullSpace:
        """That of the last layer, a linear one; ``rows`` get their components.

        If there is little in it, because an earlier request has erased it, it is only held as it
        is: else, five requests in a row would cost 5 points of RA.
        """
        features = torch.cat([part.features.float() for part in self.tail.chunks(rows)])
        scene = _weight(rows)[:, 0] > 0
        weight: Tensor = self.tail.last.weight  # type: ignore[assignment]  # maybe computed
        result = NullSpace(weight.detach().float()[self.retained], features[scene])
        if result.share < _LEAST_SHARE:
            self.settings = self.settings.without_components()
        else:
            rows.components = result.components(features, scene, self.settings.components)
        return result

    def gradients(
        self, tail: nn.Module, parameters: Sequence[nn.Parameter], rows: FeatureSet
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Returns the loss of ``rows`` and its gradients; None for an unused parameter."""
        outputs = tail(*rows.features)
        loss, *gradients = self.loss_and_gradients(outputs, rows)
        pairs = [
            (output, gradient)
            for output, gradient in zip((outputs.logits, outputs.features), gradients, strict=True)
            if gradient is not None
        ]
        ends, at_ends = zip(*pairs, strict=True)
        return loss, torch.autograd.grad(ends, list(parameters), at_ends, allow_unused=True)

    @torch.no_grad()
    def loss_and_gradients(
        self, outputs: TailOutputs, rows: FeatureSet
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The loss of a batch, and its gradients for logits and features, without autograd.

        The features' gradient is None if nothing is erased.
        """
        s, dfeatures = self.settings, None
        loss, dlogits = self._matching(outputs.logits.detach(), rows)
        if s.constant and not s.multi_label:  # `MultiLabelKL` has such a term itself
            loss = loss + self._add_variation(outputs.logits.detach(), rows, dlogits)
        if s.erase:
            explained, dfeatures = self.explained_variance(outputs.features.detach(), rows)
            loss = loss + s.erase * explained
            dfeatures = (s.erase * dfeatures).view_as(outputs.features)
        if self.null_space is not None:
            inside = _centred(outputs.features.detach(), rows)
            variance, gradient = self.null_space.variance(inside, _weight(rows).sum())
            loss = loss + s.null_space * variance
            dfeatures = (0 if dfeatures is None else dfeatures) + s.null_space * gradient
        return loss, dlogits, dfeatures

    def _matching(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        """The first two terms and their gradient, in one pass.

        The op does not centre the change of retained logits. The KL does not see a shift of all
        logits, so that a shift by the mean change, taken for constant, centres it: its own
        gradient is 0, as centred changes sum to 0.
        """
        mean, weight = self._of_rows(rows)[:2]
        mean_change = torch.mv(logits, self.mean_retained) - mean
        scale = self.settings.keep / (self.size * len(self.retained) * len(rows))
        return ops.masked_cross_entropy_and_grad(
            logits - mean_change[:, None], rows.teacher, self.forget, mean_weights(rows),
            index=rows.teacher_index, keep=scale * weight, shift=self.margin,
        )  # fmt: skip

    def _of_rows(self, rows: FeatureSet) -> RowConstants:
        """What the teacher alone decides; computed once for all rows of a set."""
        if self._constants is None or self._constants[0] is not rows.teacher:
            parts = rows.teacher.split(max(1, STATISTICS // len(self.forget)))
            columns = zip(*map(self._row_constants, parts), strict=True)
            self._constants = rows.teacher, RowConstants(*map(torch.cat, columns))
        constants = self._constants[1]
        if rows.teacher_index is None:
            return constants
        return RowConstants(*(x.index_select(0, rows.teacher_index) for x in constants))

    def _row_constants(self, teacher: Tensor) -> RowConstants:
        mean = torch.mv(teacher, self.mean_retained)
        forgotten = teacher.index_select(1, self.forgotten)
        seen = teacher.softmax(1).index_select(1, self.forgotten).sum(1)
        return RowConstants(
            mean, 1 - seen, forgotten - mean[:, None], forgotten - teacher.mean(1, keepdim=True)
        )

    def _retained(self, logits: Tensor) -> Tensor:
        """The retained logits, centred per row."""
        retained = logits.index_select(1, self.retained)
        return retained - retained.mean(1, keepdim=True)

    def _add_variation(self, logits: Tensor, rows: FeatureSet, dlogits: Tensor) -> Tensor:
        """The third term; its gradient is added to ``dlogits``."""
        mean = torch.mv(logits, self.mean_retained)
        now = _centred(logits.index_select(1, self.forgotten) - mean[:, None], rows)
        original = _centred(self._of_rows(rows).contrast, rows).square().sum().clamp(min=1e-12)
        share = self.settings.constant / original
        gradient = 2 * share * now
        dlogits.index_add_(1, self.forgotten, gradient)
        dlogits.addcmul_(gradient.sum(1, keepdim=True), self.mean_retained, value=-1)
        return share * now.square().sum()

    @torch.no_grad()
    def explained_variance(self, features: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        """Share of the variance of the forgotten logits, and the components if there are any, that
        ridge regression on ``features`` explains, and its gradient, [N, D].

        It is fitted on the scenes among ``rows``, by a linear system as large as the batch, or as
        the features [N, ...] are wide if that is less. With X the centred features and Y the
        targets, G = XX^T and A = (G + rI)^-1 Y, the unexplained part is r <Y, A>, and its gradient
        -2r A A^T X, plus what the ridge r contributes, which is in proportion to the trace of G.
        """
        target = self._of_rows(rows).target
        if rows.components is not None:
            target = torch.cat([target, rows.components], 1)
        target = _centred(target, rows)
        deviation = (target.square().sum(0) / _weight(rows).sum().clamp(min=1)).sqrt()
        target = target / deviation.clamp(min=1e-6)
        x = _centred(features.flatten(1), rows)
        of_trace = self.settings.ridge / x.shape[1]
        ridge = of_trace * x.square().sum() + 1e-12
        dual = len(x) <= x.shape[1]
        damped = x @ x.T if dual else x.T @ x
        damped.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if dual:
            solution = torch.cholesky_solve(target, factor)
        else:
            solution = (target - x @ torch.cholesky_solve(x.T @ target, factor)) / ridge
        solution = torch.where(failed == 0, solution, 0.0)
        total, unexplained = target.square().sum(), ridge * (target * solution).sum()
        of_ridge = ridge * solution.square().sum() - (target * solution).sum()
        gradient = torch.addmm(of_trace * of_ridge * x, solution, ridge * (solution.T @ x))
        total = total.clamp(min=1e-12)
        return (total - unexplained) / total, 2 * gradient / total

    @torch.no_grad()
    def evidence(self, train: FeatureSet) -> float:
        """Explained variance of the forgotten logits on up to 2,048 training rows."""
        sample = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        rows = train.select(sample[:_MEASURED].to(train.label.device))
        rows.components = None
        features = torch.cat([part.features for part in self.tail.chunks(rows)])
        return float(self.explained_variance(features, rows)[0])

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

    def to_agree(self, rows: FeatureSet) -> Tensor:
        """The rows whose answers say what became of the retained classes, bool [N]: the scenes."""
        assert rows.scene is not None
        return (rows.scene > 0) & ~rows.forgotten

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

    constant, copies_teacher = True, True

    def _matching(self, logits: Tensor, rows: FeatureSet) -> tuple[Tensor, Tensor]:
        loss, dlogits = self(logits, rows)
        change = (logits - rows.teacher) * ~self.forget
        scale = self.settings.keep / (self.size * len(self.retained) * len(rows))
        return loss + scale * change.square().sum(), dlogits + 2 * scale * change

    def _row_constants(self, teacher: Tensor) -> RowConstants:
        forgotten = teacher.index_select(1, self.forgotten)
        none = teacher.new_empty(len(teacher))  # `_matching` needs no weight or mean
        return RowConstants(none, none, forgotten, forgotten)

    def _retained(self, logits: Tensor) -> Tensor:
        return logits.index_select(1, self.retained)

    def confidence(self, rows: FeatureSet) -> Tensor:
        """1 for each row: its answers are many."""
        return torch.ones_like(rows.teacher[:, 0])

    def unmasked_agreement(self, logits: Tensor, rows: FeatureSet) -> Tensor:
        return self.answers(logits, rows)[1]


def _weight(rows: FeatureSet) -> Tensor:
    """1 for a scene, else 0; [N, 1]."""
    scene = torch.ones_like(rows.label, dtype=torch.float32) if rows.scene is None else rows.scene
    return scene[:, None]


def _centred(x: Tensor, rows: FeatureSet) -> Tensor:
    """``x``, [N, D], less its mean over the scenes; 0 where a row is not a scene."""
    weight = _weight(rows)
    return weight * (x - (weight * x).sum(0) / weight.sum().clamp(min=1))

"""The loss of deep forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..features import FeatureSet
from ..losses import MaskedKL
from .settings import DeepSettings
from .tail import DualClassifierTail, TailOutputs

_CHUNK = 256  # rows through the tail at once where no gradient is needed
_MEASURED = 2048  # training rows that explained variance is measured on
_FULL_WEIGHT = 3  # inner layers with the full weight each; more share that of three
_MINUS_INFINITY = -1e4  # a bias below all logits
# Fraction of the room above a floor to use: pushing all the way down hurts the retained classes.
USABLE_ROOM = 0.5


@torch.no_grad()
def room_above_floor(tail: DualClassifierTail, rows: FeatureSet, forget: Tensor) -> float:
    """Returns the margin that 19 of 20 rows can meet without raising a retained logit.

    It is infinite unless logits have a lower bound, such as from a ReLU after the last layer
    (SqueezeNet). There, a larger margin could only be met by raising all retained logits: retained
    classes would suffer, and none would be forgotten any better.
    """
    bias = getattr(tail.last, "bias", None)
    if not isinstance(bias, nn.Parameter) or bias.shape != forget.shape:
        return math.inf
    sample = torch.arange(0, len(rows), max(1, len(rows) // 2048), device=forget.device)
    saved = bias.detach().clone()
    rooms = []
    try:
        bias[forget] = _MINUS_INFINITY
        for index in sample.split(_CHUNK):
            part = rows.select(index)
            floor = tail(*part.features).logits[:, forget].logsumexp(1)
            rooms.append(part.teacher[:, ~forget].logsumexp(1) - floor)
    finally:
        bias.copy_(saved)
    room = float(torch.cat(rooms).quantile(0.05))
    return max(0.0, room) if room < -_MINUS_INFINITY / 2 else math.inf


class DeepObjective(MaskedKL):
    """`MaskedKL` with more terms: the training loss of deep forgetting, and its validation.

    With z the tail's logits, z' the frozen original last layer's logits on the tail's features h,
    and h_i the input of inner layer i of n (`DualClassifierTail`), the loss of a batch is::

        KL(masked teacher || z + margin)
        + unmask * KL(masked teacher || z' + margin)
        + shrink * mean(h^2) / mean(h0^2)
        + erase * R2(h)
        + inside * min(1, 3 / n) * sum_i R2(h_i)

    1. The logits match the masked original, as in output-level forgetting (`MaskedKL`; the margin
       is added to the forgotten logits).
    2. So do those of the original last layer: putting it back (the un-mask test) brings no
       forgotten class back.
    3. The features shrink, relative to the original ones h0: what the retained classes do not need
       fades. With inner layers, the weight is ``shrink_inside``.
    4. R2 is the share of the original forgotten logits' variance that a ridge regression on the
       features, fitted on the batch, explains: little is left for a linear probe. Belrose et al.,
       "LEACE", 2023, bring it to 0 in closed form; here the layers learn to.
    5. The same for what the trained layers before the last take in, from which forgotten classes
       would otherwise be relearned quickly.

    Args:
        tail: the trained tail.
        rows: training rows, whose original features give mean(h0^2).
        forget: bool [C].
        margin: in logits.
        settings: the weights.
    """

    def __init__(
        self,
        tail: DualClassifierTail,
        rows: FeatureSet,
        forget: Tensor,
        margin: float,
        settings: DeepSettings,
    ) -> None:
        super().__init__(forget, margin)
        self.tail, self.settings = tail, settings
        with torch.no_grad():
            parts = [part.features.square().flatten(1).mean(1) for part in self._outputs(rows)]
        self.energy = torch.cat(parts).mean().clamp(min=1e-12)

    def gradients(
        self, tail: nn.Module, parameters: Sequence[nn.Parameter], rows: FeatureSet
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """Returns the loss of ``rows`` and its gradients; None for an unused parameter."""
        loss = self.loss(tail(*rows.features), rows)
        return loss.detach(), torch.autograd.grad(loss, list(parameters), allow_unused=True)

    def loss(self, outputs: TailOutputs, rows: FeatureSet) -> Tensor:
        """The loss of a batch, differentiable."""
        s = self.settings
        inner = [self.explained_variance(x, rows.teacher) for x in outputs.inside]
        relative_energy = outputs.features.square().mean() / self.energy
        return (
            self.divergence(outputs.logits, rows)
            + s.unmask * self.divergence(outputs.unmasked, rows)
            + (s.shrink_inside if inner else s.shrink) * relative_energy
            + s.erase * self.explained_variance(outputs.features, rows.teacher)
            + s.inside * min(1, _FULL_WEIGHT / max(1, len(inner))) * sum(inner)
        )

    def explained_variance(self, features: Tensor, teacher: Tensor) -> Tensor:
        """Share of the forgotten logits' variance that ridge regression on ``features`` explains.

        In the dual form, whose linear system is as large as the batch however wide the features,
        [N, ...], are; ``teacher`` holds the original logits, [N, C].
        """
        relative = teacher[:, self.forget] - teacher.mean(1, keepdim=True)
        target = relative - relative.mean(0)
        target = target / target.square().mean(0).sqrt().clamp(min=1e-6)
        centred = features.flatten(1)
        centred = centred - centred.mean(0)
        gram = centred @ centred.T
        count, width = centred.shape
        ridge = self.settings.ridge * gram.diagonal().mean() * count / width + 1e-12
        damped = gram + ridge * torch.eye(count, device=gram.device)
        explained: Tensor = (target * (gram @ torch.linalg.solve(damped, target))).sum()
        return explained / target.square().sum().clamp(min=1e-12)

    @torch.no_grad()
    def measure(self, train: FeatureSet, validation: FeatureSet) -> dict[str, float]:
        """Measures how much the features reveal of the forgotten classes.

        Returns:
            ``unmask_leak``: share of validation rows whose top class is a forgotten one once the
            original last layer is back. ``evidence``: explained variance of the forgotten logits
            on up to 2,048 training rows, as the validation rows are too few for it.
            ``evidence_inside``: the largest one of inner layers, if there are any.
        """
        unmasked = torch.cat([part.unmasked for part in self._outputs(validation)])
        sample = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        rows = train.select(sample[:_MEASURED].to(train.label.device))
        parts = [(part.features, *part.inside) for part in self._outputs(rows)]
        shares = [
            float(self.explained_variance(torch.cat(column), rows.teacher))
            for column in zip(*parts, strict=True)
        ]
        leak = float(self.forget[unmasked.argmax(1)].float().mean())
        inside = {"evidence_inside": max(shares[1:])} if shares[1:] else {}
        return {"unmask_leak": leak, "evidence": shares[0], **inside}

    @torch.no_grad()
    def score(self, _tail: nn.Module, rows: FeatureSet) -> tuple[float, float, float]:
        logits = torch.cat([part.logits for part in self._outputs(rows)])
        finite = bool(logits.isfinite().all())
        divergence = float(self.divergence(logits, rows)) if finite else math.nan
        leaked, same = self.answers(logits, rows)
        retained = ~rows.forgotten
        agreement = float(same[retained].float().mean()) if bool(retained.any()) else 1.0
        return divergence, float(leaked.float().mean()), agreement

    def _outputs(self, rows: FeatureSet) -> Iterator[TailOutputs]:
        chunks = zip(*[f.split(_CHUNK) for f in rows.features], strict=True)
        return (self.tail(*chunk) for chunk in chunks)

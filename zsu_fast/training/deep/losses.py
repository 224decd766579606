"""The four terms of deep forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..features import FeatureSet
from ..loop import ValidationResult
from ..losses import MaskedKL
from .settings import DeepSettings
from .tail import DualClassifierTail, TailOutputs

_INNER = 3  # inner layers that have the full weight
SHARE_OF_ROOM = (
    0.5  # of the room above a floor: to get to the floor itself costs retained classes much
)
_FAR = 1e4  # below all logits


@torch.no_grad()
def room_above_floor(tail: DualClassifierTail, rows: FeatureSet, forget: Tensor) -> float:
    """The margin that 19 of 20 rows can meet without any other logit rising, or infinity.

    A ReLU behind the last layer, as in SqueezeNet, leaves logits a lowest value. What a larger
    margin asks for is then that all the others rise: retained classes suffer, none is forgotten.
    """
    bias = getattr(tail.last, "bias", None)
    if not isinstance(bias, nn.Parameter) or bias.shape != forget.shape:
        return math.inf
    some = torch.arange(0, len(rows), max(1, len(rows) // 2048), device=forget.device)
    kept = bias.detach().clone()
    rooms = []
    try:
        bias[forget] = -_FAR
        for part in some.split(256):
            picked = rows.select(part)
            lowest = tail(*picked.features).logits[:, forget].logsumexp(1)
            rooms.append(picked.teacher[:, ~forget].logsumexp(1) - lowest)
    finally:
        bias.copy_(kept)
    room = float(torch.cat(rooms).quantile(0.05))
    return max(0.0, room) if room < _FAR / 2 else math.inf


class DeepObjective:
    """The four terms, and how held-out rows fare."""

    def __init__(
        self,
        tail: DualClassifierTail,
        rows: FeatureSet,
        forget: Tensor,
        margin: float,
        settings: DeepSettings,
    ) -> None:
        self.tail, self.forget, self.settings = tail, forget, settings
        self.margin, self.masked = margin, MaskedKL(forget, margin)
        with torch.no_grad():
            energy = torch.cat(
                [part.features.square().flatten(1).mean(1) for part in self._parts(rows)]
            )
        self.energy = energy.mean().clamp(min=1e-12)

    def __call__(self, rows: FeatureSet) -> Tensor:
        """The loss of a batch, with autograd."""
        seen, s = self.tail(*rows.features), self.settings
        inside = [self.evidence(outputs, rows.teacher) for outputs in seen.inside]
        return (
            self.masked.divergence(seen.logits, rows)
            + s.unmask * self.masked.divergence(seen.unmasked, rows)
            + (s.shrink_inside if inside else s.shrink) * self.size(seen.features)
            + s.erase * self.evidence(seen.features, rows.teacher)
            + s.inside * min(1, _INNER / max(1, len(inside))) * sum(inside)
        )

    def size(self, features: Tensor) -> Tensor:
        """The features' mean square, in units of the original's."""
        return features.square().mean() / self.energy

    def evidence(self, features: Tensor, teacher: Tensor) -> Tensor:
        """Share of the forgotten logits' variance that ridge regression on ``features`` explains.

        In its dual form, so that the system has the size of the batch however wide the features.
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
    def look(self, rows: FeatureSet, held_out: FeatureSet) -> dict[str, float]:
        """`forget_deeply`'s facts; the evidence needs more rows than are held out."""
        unmasked = torch.cat([part.unmasked for part in self._parts(held_out)])
        some = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:2048]
        some_rows = rows.select(some.to(rows.label.device))
        parts = [(part.features, *part.inside) for part in self._parts(some_rows)]
        shares = [
            float(self.evidence(torch.cat(column), some_rows.teacher))
            for column in zip(*parts, strict=True)
        ]
        facts = {
            "unmask_leak": float(self.forget[unmasked.argmax(1)].float().mean()),
            "evidence": shares[0],
        }
        return facts | ({"evidence_inside": max(shares[1:])} if shares[1:] else {})

    @torch.no_grad()
    def check(
        self, rows: FeatureSet, step: int, attempt: int, rate: float, loss: float
    ) -> ValidationResult:
        logits = torch.cat([part.logits for part in self._parts(rows)])
        divergence = float(self.masked.divergence(logits, rows))
        answer, kept = logits.argmax(1), ~rows.forgotten
        wanted = rows.teacher.masked_fill(self.forget, -torch.inf).argmax(1)
        agreement = float((answer == wanted)[kept].float().mean()) if bool(kept.any()) else 1.0
        leak = float(self.forget[answer].float().mean())
        if not bool(logits.isfinite().all()):
            divergence = math.nan
        return ValidationResult(step, attempt, rate, loss, divergence, leak, agreement)

    def _parts(self, rows: FeatureSet) -> Iterator[TailOutputs]:
        chunks = zip(*[f.split(256) for f in rows.features], strict=True)
        return (self.tail(*chunk) for chunk in chunks)

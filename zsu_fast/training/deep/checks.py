"""The data-free checks of deep forgetting, and the factor that they choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..features import FeatureSet
from ..fit_task import copied_values, load_values
from .losses import DeepObjective
from .open_set import StrangerObjective
from .settings import DeepSettings

# Deep forgetting has failed if the original last layer gives less than this share of the scenes the
# same answer, each weighted by the original's confidence: which of 1,000 classes it guesses for a
# scene like none of them says nothing about images.
LEAST_AGREEMENT = 0.8


@dataclass(frozen=True)
class Checks:
    """Data-free measurements on held-out rows, with the original last layer."""

    objective: DeepObjective
    validation: FeatureSet

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``unmask_leak`` and the like, see `forget_deeply`."""
        rows = self.validation
        assert rows.scene is not None
        logits = torch.cat([part.logits for part in self.objective.tail.chunks(rows)])
        leaked, _ = self.objective.answers(logits, rows)
        same = self.objective.unmasked_agreement(logits, rows)
        inverted, counted = (rows.scene == 0) & rows.forgotten, self.objective.to_agree(rows)
        weight = self.objective.confidence(rows)[counted]
        measured = {
            "unmask_leak": _mean(leaked[inverted], math.nan),
            "agreement": float((weight * same[counted]).sum() / weight.sum())
            if len(weight)
            else 1.0,
        }
        if isinstance(self.objective, StrangerObjective):
            measured["accepted"] = _mean(self.objective.accepted(logits[inverted]), 0.0)
        return measured


def _mean(which: Tensor, of_none: float) -> float:
    return float(which.float().mean()) if len(which) else of_none


@torch.no_grad()
def extrapolate(
    checks: Checks,
    parameters: Sequence[nn.Parameter],
    before: Sequence[Tensor],
    settings: DeepSettings,
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Multiplies the change of the parameters by the first factor that leaves no leak.

    Returns that factor with what was measured at it, and the same of each factor that was tried.

    A moderate run that is extrapolated costs less retained accuracy than a longer one. If nearly
    all answers stay, a larger factor is taken: it hides more from a probe, and of strangers fewer
    are accepted as someone else. If each factor leaks, or if too few answers stay before one does
    not, the one that leaks least of those tried is taken.
    """
    after = copied_values(parameters)
    tried: list[dict[str, float]] = []
    chosen: dict[str, float] | None = None
    for factor in settings.factors:
        if chosen is not None and factor > settings.robust_factor:
            break
        load_values(parameters, [a.lerp(b, factor) for a, b in zip(before, after, strict=True)])
        tried.append({"factor": factor, **checks.measure()})
        leaks, agreement = tried[-1]["unmask_leak"] > settings.leak, tried[-1]["agreement"]
        if not leaks and (chosen is None or agreement >= settings.robust):
            chosen = tried[-1]
        elif chosen is not None or agreement < LEAST_AGREEMENT:
            break
    if chosen is None:
        kept = [result for result in tried if result["agreement"] >= LEAST_AGREEMENT] or tried
        chosen = min(kept, key=lambda result: result["unmask_leak"])
    factor = chosen["factor"]
    load_values(parameters, [a.lerp(b, factor) for a, b in zip(before, after, strict=True)])
    return chosen, tried


def shortfall(facts: dict[str, Any], settings: DeepSettings, slack: float = 0.0) -> str | None:
    """Why deep forgetting has failed, or None.

    Args:
        facts: ``unmask_leak`` and ``agreement``, each ``before`` and ``after``.
        settings: for the limit of the leak.
        slack: how far both may be beyond their limits.
    """
    leak, agreement = facts["unmask_leak"], facts["agreement"]
    if leak["after"] > max(settings.most_leak, settings.leak) + slack:
        return (
            f"the original last layer still assigns {leak['after']:.0%} of the held-out rows "
            f"of forgotten classes to one, {leak['before']:.0%} before"
        )
    if agreement["after"] < LEAST_AGREEMENT - slack:
        where = "rows of other identities" if settings.stranger else "scenes"
        return f"on held-out {where}, only {agreement['after']:.0%} of the answers stayed"
    return None

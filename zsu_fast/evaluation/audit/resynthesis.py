"""Can gradient ascent still reach a forgotten class, and in how many steps?"""

from __future__ import annotations

from dataclasses import dataclass

from ...runtime.progress import Reporter
from ...synthesis.ascent_settings import AscentSettings
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import input_space
from ...synthesis.synthesize import ascend
from .audited_model import AuditedModel

# Steps per attempt; the original needs 1 to 40.
MAX_STEPS = 100


@dataclass
class Resynthesis:
    """The result of ascent towards the forgotten classes.

    Attributes:
        hit_rate: attempts that reached their target confidence, in per cent.
        steps: mean ascent steps, `MAX_STEPS` for an attempt that never reached it.
        impressions: for the report's pictures; None if the classes are hidden by a mask.
    """

    hit_rate: float
    steps: float
    impressions: ClassImpressions | None


def resynthesise(
    audited: AuditedModel, classes: list[int], per_class: int, seed: int
) -> Resynthesis:
    """Synthesises impressions of ``classes`` from this model, one attempt each.

    Noise and target confidences depend on the seed alone, so they are the same for every model.
    Classes that `zsu_fast.mask` hides can't be reached: 0 per cent.
    """
    if set(classes) <= set(audited.hidden):
        return Resynthesis(0.0, float(MAX_STEPS), None)
    settings = AscentSettings(per_class=per_class, max_steps=MAX_STEPS, restarts=0, seed=seed)
    space = input_space(audited.model, audited.spec, settings.precision)
    found = ascend(audited.model, space, classes, settings, Reporter(False))
    steps = found.steps.float().masked_fill(~found.hit, MAX_STEPS)
    return Resynthesis(100 * found.hit_rate, float(steps.mean()), found)

"""Can gradient ascent still reach a forgotten class, and in how many steps?"""

from __future__ import annotations

from dataclasses import dataclass

from ...models.input_spec import InputSpec
from ...runtime.progress import Reporter
from ...synthesis.ascent import AscentSettings
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import input_space
from ...synthesis.synthesize import ascend
from .audited_model import AuditedModel


@dataclass
class Reached:
    """How ascent towards the forgotten classes went.

    Attributes:
        hit: per cent of attempts that reached their confidence.
        steps: mean ascent steps, `MOST` for an attempt that never did.
        made: the impressions, for the report's pictures.
    """

    hit: float
    steps: float
    made: ClassImpressions | None


# Steps of one attempt; the original needs 1 to 40.
MOST = 100


def reach(
    subject: AuditedModel, classes: list[int], per_class: int, spec: InputSpec, seed: int
) -> Reached:
    """Synthesises impressions of ``classes`` of this model, one attempt each.

    The same noise and target confidences for every subject (they depend on the seed alone).
    A class that `zsu_fast.mask` hides can't be reached: 0 per cent.
    """
    if set(classes) <= set(subject.hidden):
        return Reached(0.0, float(MOST), None)
    settings = AscentSettings(per_class=per_class, max_steps=MOST, restarts=0, seed=seed)
    space = input_space(subject.model, spec, settings.precision)
    made = ascend(subject.model, space, spec, classes, settings, Reporter(False))
    steps = made.steps.float().masked_fill(~made.hit, MOST)
    return Reached(100 * made.hit_rate, float(steps.mean()), made)

"""Deep forgetting: the classes leave the features, not only the outputs.

The last layer *and* some layers before it are trained on `DeepObjective`. Training preserves
features only where it sees them, and impressions are unlike any real image: so most rows are
*dead-leaves images* (`synthesis.dead_leaves`), some as drawn and some optimised for a class by a
few ascent steps, beside the impressions and mixtures of them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...runtime.measuring import multiply_adds
from ...runtime.progress import Reporter
from ..features import FeatureSettings, logit_margin
from ..fit_task import FitTask, trained_parameters
from ..loop import LoopSettings, relative_learning_rate
from ..trainer import Schedule, Trainer
from .data import DeepInputs, deep_train_val_sets
from .losses import USABLE_ROOM, DeepObjective, room_above_floor
from .settings import DeepSettings
from .tail import DualClassifierTail

_PRUNED = 0.1  # a weight with at least this share of zeros is taken for pruned


def forget_deeply(
    inputs: DeepInputs,
    features: FeatureSettings,
    loop: LoopSettings,
    settings: DeepSettings,
    report: Reporter,
) -> dict[str, Any]:
    """Trains the tail in place until the classes are gone from its features.

    The last layer is then still to be fitted as in output-level forgetting, whose rows reach
    farther from the impressions.

    Args:
        inputs: the model, where it is split, its impressions, and the classes.
        features: for the margin.
        loop: for its learning rate, if given, and its ``steps``, if fewer.
        settings: the constants of deep forgetting.
        report: called after every validation; a stop that it asks for keeps the current state.

    Returns:
        For the record: ``stopped``, ``learning_rate``, ``history`` (`Fit`); ``rows`` and
        ``held_out``, the number of training and validation rows; ``margin``, and
        ``margin_asked``, which is smaller if logits have a lower bound; and, each ``before`` and
        ``after``, `DeepObjective.measure`.

    Raises:
        ModelError: the model's last layer takes more than one tensor from the others.
    """
    task, margin, objective = _deep_task(inputs, features, settings)
    schedule = _schedule(task, inputs, loop, objective.settings)
    before = objective.measure(task.train, task.validation)
    fit = Trainer(task, schedule, report).run()
    if fit.best is fit.history[0]:
        fit.stopped += " to the start; given up"
    after = objective.measure(task.train, task.validation)
    return {
        "stopped": fit.stopped,
        "learning_rate": fit.learning_rate,
        "margin": margin,
        "margin_asked": objective.margin,
        "history": [asdict(result) for result in fit.history],
        "rows": len(task.train),
        "held_out": len(task.validation),
        **{k: {"before": before[k], "after": after[k]} for k in before},
    }


def _deep_task(
    inputs: DeepInputs, features: FeatureSettings, settings: DeepSettings
) -> tuple[FitTask, float, DeepObjective]:
    """Builds the task; returns it with the margin that ``features`` gives, and its objective."""
    forget = inputs.forget
    tail = DualClassifierTail(
        inputs.model, inputs.split, inputs.impressions.images[:4].to(forget.device)
    )
    settings = settings.fit_to(len(tail.trained) + 1)
    train, validation, impressions = deep_train_val_sets(inputs, settings)
    margins = logit_margin(train.teacher[:impressions], train.label[:impressions])
    margin = features.margin_for(float(margins.mean()), len(forget), forget_logits_only=False)
    reachable = min(margin, USABLE_ROOM * room_above_floor(tail, train, forget))
    objective = DeepObjective(tail, train, forget, reachable, settings)
    parameters = trained_parameters(inputs.model, inputs.split)
    task = FitTask(
        tail,
        parameters,
        train,
        validation,
        objective,
        objective,
        torch.Generator().manual_seed(inputs.seed),
        masks=[_unpruned(p) for p in parameters],
        fast_kernels=False,  # they round differently; published results were measured without
    )
    return task, margin, objective


def _schedule(
    task: FitTask, inputs: DeepInputs, loop: LoopSettings, settings: DeepSettings
) -> Schedule:
    """All steps in one attempt; if that diverges, three more, each at a lower learning rate."""
    one_row = task.train.features_at(task.train.label.new_zeros(1))
    row_work = multiply_adds(inputs.split.tail, *one_row)
    return Schedule(
        steps=min(settings.steps_for(row_work, task.device), loop.steps or settings.steps),
        batch=min(settings.batch, len(task.train)),
        learning_rate=loop.learning_rate or relative_learning_rate(task.parameters),
        replacement=True,
        validations=10,
        patience=None,
        keep="complete",
        leak_goal=1.0,
        slower=(0.3, 0.3**2, 0.3**3),
    )


def _unpruned(parameter: Tensor) -> Tensor | None:
    """1 where a pruned weight is not 0, so that its zeros stay; None if it is not pruned."""
    mask = parameter.detach() != 0
    pruned = parameter.ndim > 1 and float(mask.float().mean()) < 1 - _PRUNED
    return mask.to(parameter.dtype) if pruned else None

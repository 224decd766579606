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

from ...errors import ArgumentError
from ...models.wrapper import LogitsModel
from ...runtime.measuring import multiply_adds
from ...runtime.progress import Reporter
from ...splitting.layers import layer_names
from ...splitting.split import Split, find_split
from ..features import FeatureSettings, logit_margin
from ..fit_task import FitTask, trained_parameters
from ..trainer import LoopSettings, Schedule, Trainer, relative_learning_rate
from .data import DeepInputs, deep_train_val_sets
from .losses import USABLE_ROOM, DeepObjective, room_above_floor
from .settings import DeepSettings
from .tail import DualClassifierTail

# Share of the layers with weights that is trained beside the last one. Features of small images are
# preserved on many scenes, those of large images on few.
_SHARE, _SHARE_OF_LARGE = 0.3, 0.1
_LARGE = 3 * 64 * 64  # an image of more values than this is large
_PRUNED = 0.1  # a weight with at least this share of zeros is taken for pruned


def find_deep_split(model: LogitsModel, at: str | int, images: Tensor) -> Split:
    """Splits ``model`` before its last layers.

    "auto" trains three in ten of the layers with weights beside the last one, or one in ten for
    large images; at least one.

    Args:
        model: from `working_copy`.
        at: "auto", or the module at which the tail starts.
        images: some valid images, [N, ...].

    Raises:
        ArgumentError: nothing but the last layer would be trained.
    """
    names, reason = layer_names(model.module, images[:4]), "named by the caller"
    if at == "auto":
        share = _SHARE if images[0].numel() <= _LARGE else _SHARE_OF_LARGE
        start = len(names) - 1 - max(1, round(share * len(names)))
        if start < 0:
            raise ArgumentError(
                "depth",
                "got 'deep', and the model has a single layer with weights: no features",
                "Pass depth='output'.",
            )
        at, reason = names[start], f"deep: {len(names) - start} of {len(names)} layers"
    split = find_split(model, at, images, torch.zeros(len(images), dtype=torch.int64))
    if split.output_level:
        raise ArgumentError(
            "tail",
            f"got {at!r} with depth='deep', and only the last layer follows it",
            f"Name an earlier module, such as {names[max(0, len(names) - 2)]!r}, or leave it out.",
        )
    split.reason = reason
    return split


def forget_deeply(
    inputs: DeepInputs,
    features: FeatureSettings,
    loop: LoopSettings,
    settings: DeepSettings,
    report: Reporter,
) -> dict[str, Any]:
    """Trains the tail in place until its features no longer show the classes.

    The last layer is then still to be fitted as in output-level forgetting, whose rows reach
    farther from the impressions.

    Args:
        inputs: what it starts from.
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
    images = inputs.impressions.images[:4].to(forget.device)
    tail = DualClassifierTail(inputs.model, inputs.split, images)
    settings = settings.fit_to(len(tail.trained) + 1)
    train, validation, impressions = deep_train_val_sets(inputs, settings)
    margins = logit_margin(train.teacher[:impressions], train.label[:impressions])
    margin = features.margin_for(float(margins.mean()), len(forget), forget_logits_only=False)
    reachable = min(margin, USABLE_ROOM * room_above_floor(tail, train, forget))
    objective = DeepObjective(tail, train, forget, reachable, settings)
    parameters = trained_parameters(inputs.model, inputs.split)
    masks = [_unpruned(p) for p in parameters]
    generator = torch.Generator().manual_seed(inputs.seed)
    task = FitTask(tail, parameters, train, validation, objective, objective, generator, masks)
    task.fast_kernels = False  # they round differently; published results were measured without
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
        slower=(0.3, 0.3**2, 0.3**3),
    )


def _unpruned(parameter: Tensor) -> Tensor | None:
    """1 where a pruned weight is not 0, so that its zeros stay; None if it is not pruned."""
    mask = parameter.detach() != 0
    pruned = parameter.ndim > 1 and float(mask.float().mean()) < 1 - _PRUNED
    return mask.to(parameter.dtype) if pruned else None

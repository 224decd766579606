"""Deep forgetting: the classes leave the features, not only the outputs.

The layers ahead of the last one are trained *through* the frozen original last layer, on scenes and
inverted rows (`rows`). The last layer is then fitted to the new features as in output-level
forgetting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...models.multi_label import predicted
from ...models.wrapper import LogitsModel
from ...runtime import memory
from ...runtime.measuring import multiply_adds
from ...splitting.batch_dim import BoundaryTensors
from ...synthesis.impressions import ClassImpressions
from ..features import FeatureSet, FeatureSettings, absence_margin, logit_margin
from ..fit_task import FitTask, copied_values, load_values
from ..trainer import RELATIVE_STEP, Fit, LoopSettings, Schedule, Trainer, relative_learning_rate
from .checks import LEAST_AGREEMENT, Checks, extrapolate, shortfall
from .losses import USABLE_ROOM, DeepObjective, MultiLabelDeepObjective, room_above_floor
from .open_set import ACCEPTED_AT, StrangerObjective, acceptance_threshold
from .rows import Scenes
from .settings import DeepSettings
from .split import DeepSplit
from .tail import FrozenClassifierTail

_COPIED = 256  # rows at once
_PRUNED = 0.1  # a weight with at least this share of zeros is taken for pruned
_VALIDATION = 8, 4  # one scene, and one inverted row, in this many is held out
# By how much leak and agreement miss their limits when an early check gives up, and the steps ahead
# of which it doesn't.
_SLACK, _FEWEST_CHECKED = 0.2, 25
# Mean lead of the inverted rows' classes, in standard deviations of the logits of scenes, above
# which the rows resemble no image (1e6 in a random RepVGG whose BatchNorm layers are fused).
_MOST_MARGIN = 1000.0


class DeepFailed(Exception):
    """The data-free checks say that the features still hold the classes, or are damaged.

    Attributes:
        facts: what was measured, for the record.
    """

    def __init__(self, reason: str, facts: dict[str, Any]) -> None:
        super().__init__(reason)
        self.facts = facts


@dataclass(frozen=True)
class DeepRows:
    """Rows at the split, scenes and inverted ones, each with the original's logits.

    Attributes:
        rows: all, those for training first: both parts are views, as features may take gigabytes.
        order: int64 [N], the place of each among the scenes, followed by the inverted rows.
        training: number of rows for training.
    """

    rows: FeatureSet
    order: Tensor
    training: int

    @classmethod
    @torch.no_grad()
    def label(
        cls,
        tail: FrozenClassifierTail,
        scenes: BoundaryTensors,
        inverted: BoundaryTensors,
        labels: Tensor,
        forget: Tensor,
        multi_label: bool = False,
    ) -> DeepRows:
        """Labels the rows by the original tail; ``labels`` are those of the inverted rows."""
        count, total = len(scenes[0]), len(scenes[0]) + len(labels)
        place = torch.arange(total, device=forget.device)
        every = torch.where(place < count, *_VALIDATION)
        held = place % every == every - 1
        order = held.long().argsort(stable=True)
        features = tuple(_rows_of(*pair, order) for pair in zip(scenes, inverted, strict=True))
        scene = (order < count).float()
        empty = torch.empty(total, 0, device=forget.device)
        rows = FeatureSet(features, empty, empty, empty)
        rows.teacher = torch.cat([part.logits for part in tail.chunks(rows)])
        rows.label = rows.teacher.argmax(1)
        drawn = scene > 0
        rows.label[~drawn] = labels.to(forget.device)[order[~drawn] - count]
        rows.forgotten, rows.scene = forget[rows.label], scene
        if multi_label:
            rows.forgotten = (predicted(rows.teacher) & forget).any(1)
        return cls(rows, order, int((~held).sum()))

    def split(self) -> tuple[FeatureSet, FeatureSet]:
        """The rows for training, and those for validation."""
        parts = slice(self.training), slice(self.training, None)
        train, held = (self.rows.part(part) for part in parts)
        return train, held

    @property
    def teacher(self) -> Tensor:
        """The original's logits [N, C] of the scenes, followed by the inverted rows."""
        return self.rows.teacher[self.order.argsort()]


def _rows_of(scenes: Tensor, inverted: Tensor, order: Tensor) -> Tensor:
    """``torch.cat([scenes, inverted])[order]``, without that tensor in between."""
    found, count = memory.empty_rows(scenes, len(order)), len(scenes)
    for place in torch.arange(len(order), device=order.device).split(_COPIED):
        wanted = order[place]
        scene = wanted < count
        found[place[scene]] = scenes[wanted[scene]]
        found[place[~scene]] = inverted[wanted[~scene] - count]
    return found


def forget_deeply(
    model: LogitsModel,
    deep: DeepSplit,
    scenes: Scenes,
    impressions: ClassImpressions,
    forget: Tensor,
    features: FeatureSettings,
    loop: LoopSettings,
    settings: DeepSettings,
    seed: int,
    report: Callable[..., None],
    checked: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains the layers of ``deep`` in place until their features no longer show the classes.

    Args:
        model: the working copy that ``deep`` shares its parameters with.
        deep: what is trained.
        scenes: from `RowSource.scenes`.
        impressions: inverted rows (`RowSource.invert`), or images.
        forget: bool [C].
        features: for the margin of the last layer's fit.
        loop: for its learning rate and batch, if given, and its ``steps``, if fewer.
        settings: the constants of deep forgetting.
        seed: of the batches.
        report: called after every validation; a stop that it asks for keeps the current state.
        checked: called after every validation, too, unless training gives up; what it raises ends
            training with the parameters as they were.

    Returns:
        For the record: ``layers``, ``stopped``, ``learning_rate``, ``history`` (`Fit`); ``rows``
        and ``held_out``, the number of training and validation rows; ``margin`` of the last layer's
        fit and ``margin_asked`` here; ``null_space``, "erased", "held" constant or "free" in the
        loss, and ``rounds``, how many times more was erased; ``factor``, by which the change was
        multiplied, and ``factors``, the leak and agreement at each that was tried; and, each
        ``before`` and ``after``: ``unmask_leak``, the share of held-out inverted rows of forgotten
        classes that the original last layer still assigns to one (NaN if there is none),
        ``agreement``, the share of held-out scenes whose masked answer stays, weighted by the
        original's confidence in it, and ``evidence``, `DeepObjective.evidence`. For strangers,
        ``agreement`` is that of the held-out rows of `StrangerObjective.to_agree`; also
        ``accepted``, the share of the rows that count for ``unmask_leak`` that any identity
        accepts, and ``threshold``, the logit from which one does.

    Raises:
        DeepFailed: the checks say so; the parameters are as they were.
    """
    device = forget.device
    labels = impressions.labels.to(device)
    points = impressions.images.to(device)
    at_split = deep.features if impressions.space == "tail-input" else deep.image_features
    with torch.no_grad():  # no name holds the features: `deep_task` frees them
        task, margin = deep_task(
            model, deep, scenes.features, at_split(points), labels, forget, features, settings, seed
        )
    parameters, train, objective = task.parameters, task.train, task.objective
    assert isinstance(objective, DeepObjective)
    before = copied_values(parameters)
    checks = Checks(objective, task.validation)
    facts: dict[str, Any] = {name: {"before": v} for name, v in checks.measure().items()}
    facts["evidence"] = {"before": objective.evidence(train)}
    facts["null_space"] = objective.null_space_treatment

    def choose_factor() -> dict[str, Any]:
        """Leaves the parameters at the factor to take, and returns the facts with it."""
        chosen, tried = extrapolate(checks, parameters, before, settings)
        after = {name: {**facts[name], "after": chosen[name]} for name in chosen.keys() & facts}
        return {**facts, **after, "factor": chosen["factor"], "factors": tried}

    def report_and_check(stage: str, done: int, total: int, **numbers: float) -> None:
        """Gives up after a quarter of the steps if a limit is far off, and no larger factor left
        that would not damage the features: with one left, leak may still fall from 100 % to 0.
        """
        report(stage, done, total, **numbers)
        if _FEWEST_CHECKED <= done < total / 2:
            trained = copied_values(parameters)
            found = choose_factor()
            load_values(parameters, trained)
            reason = shortfall(found, settings, _SLACK)
            if reason and found["factors"][-1]["agreement"] < LEAST_AGREEMENT:
                raise DeepFailed(f"after {done} of {total} steps, {reason}", found)
        checked()

    try:
        schedule = _schedule(task, loop, settings)
        fit = Trainer(task, schedule, report_and_check).run()
        if fit.best is fit.history[0]:
            raise DeepFailed(f"{fit.stopped} to the start; given up", facts)
        facts["rounds"] = _erase_more(task, checks, schedule, fit, report)
        facts = choose_factor()
        if reason := shortfall(facts, settings):
            raise DeepFailed(reason, facts)
    except BaseException:
        load_values(parameters, before)
        raise
    facts["evidence"]["after"] = objective.evidence(train)
    if isinstance(objective, StrangerObjective):
        facts["threshold"] = objective.accept_from
    facts |= {
        "layers": deep.parameters,
        "inverted_at": deep.early.name,
        "drawn_as": list(deep.shape),
        "stopped": fit.stopped,
        "learning_rate": fit.learning_rate,
        "margin": margin,
        "margin_asked": objective.margin,
        "history": [asdict(result) for result in fit.history],
        "rows": len(train),
        "held_out": len(task.validation),
    }
    return facts


def _erase_more(
    task: FitTask, checks: Checks, schedule: Schedule, fit: Fit, report: Callable[..., None]
) -> int:
    """Trains for further rounds, each with twice the erase term, while nearly all answers stay.

    Their validations are added to the history of ``fit``. Returns the number of rounds. Twice the
    erase term from the start makes training unstable.
    """
    objective, rounds, short = checks.objective, 0, max(1, schedule.steps // 3)
    most, robust = objective.settings.rounds, objective.settings.robust
    while (
        rounds < most
        and fit.history[-1].step == schedule.steps  # not stopped
        and checks.measure()["agreement"] >= robust
    ):
        objective.settings = replace(objective.settings, erase=2 * objective.settings.erase)
        schedule = replace(schedule, steps=short)
        fit.history += Trainer(task, schedule, report).run().history
        rounds += 1
    return rounds


def deep_task(
    model: LogitsModel,
    deep: DeepSplit,
    scenes: BoundaryTensors,
    inverted: BoundaryTensors,
    labels: Tensor,
    forget: Tensor,
    features: FeatureSettings,
    settings: DeepSettings,
    seed: int,
) -> tuple[FitTask, float]:
    """What `forget_deeply` trains: rows, loss and tail; and the margin of the last layer's fit.

    Args:
        model, deep, forget, features, settings, seed: as there.
        scenes, inverted: boundary tensors of ``deep.split``, each [N, ...].
        labels: of the inverted rows, int64 [N].
    """
    tail = FrozenClassifierTail(model, deep)
    data = DeepRows.label(tail, scenes, inverted, labels, forget, settings.multi_label)
    del inverted  # they are in ``data`` now
    named = dict(model.module.named_parameters())
    parameters = [named[name] for name in deep.parameters]
    data.rows.features = tail.speed_up(parameters, data.rows.features)
    train, validation = data.split()
    objective, margin = _objective(tail, train, data.teacher, labels, features, settings, forget)
    assert train.scene is not None
    count, share = train.scene.sum(), settings.inverted_share
    weights = torch.where(
        train.scene > 0, (1 - share) / count, share / (len(train) - count).clamp(min=1)
    )
    task = FitTask(
        tail, parameters, train, validation, objective, objective,
        torch.Generator().manual_seed(seed), [_unpruned(p) for p in parameters],
        betas=settings.betas, sampling=weights.cpu(),
    )  # fmt: skip
    task.row_work = multiply_adds(deep.split.tail, *train.features_at(labels.new_zeros(1)))
    return task, margin


def _objective(
    tail: FrozenClassifierTail,
    train: FeatureSet,
    teacher: Tensor,
    labels: Tensor,
    features: FeatureSettings,
    settings: DeepSettings,
    forget: Tensor,
) -> tuple[DeepObjective, float]:
    """The objective, and the margin of the last layer's fit.

    ``teacher`` holds the logits of all rows, the inverted ones, with their ``labels``, at the end.
    """
    if settings.multi_label:
        logits = teacher[:, forget]
        margin = absence_margin(logits) if features.margin is None else features.margin
        usual = max(settings.margin, absence_margin(logits, 0.5))
        return MultiLabelDeepObjective(tail, train, forget, usual, settings), margin
    inverted = teacher[-len(labels) :]
    margins = logit_margin(inverted, labels)
    lead, usual = float(margins.mean()), float(teacher[: -len(labels)].std())
    if lead > _MOST_MARGIN * usual:
        raise DeepFailed(
            f"the logits of inverted rows lead by {lead:.3g} on average, where those of scenes "
            f"have a standard deviation of {usual:.3g}: no image has such features",
            {},
        )
    margin = features.margin_for(lead, len(forget), forget_logits_only=False)
    if not _is_linear_last(tail, train):
        settings = settings.without_null_space()
    reachable = min(settings.margin, USABLE_ROOM * room_above_floor(tail, train, forget))
    if settings.stranger:
        thresholds = [
            acceptance_threshold(inverted, labels, forget, rate)
            for rate in (settings.stranger_rate, ACCEPTED_AT)
        ]
        return StrangerObjective(tail, train, forget, reachable, settings, *thresholds), margin
    return DeepObjective(tail, train, forget, reachable, settings), margin


def _is_linear_last(tail: FrozenClassifierTail, rows: FeatureSet) -> bool:
    """Whether the last layer is a linear one of a vector per row."""
    if not isinstance(tail.last, nn.Linear):
        return False
    features = next(tail.chunks(rows.part(slice(1)))).features
    return features.ndim == 2 and features.shape[1] == tail.last.in_features


def _schedule(task: FitTask, loop: LoopSettings, settings: DeepSettings) -> Schedule:
    """All steps in one attempt; if that diverges, three more, each at a lower learning rate."""
    steps, batch = settings.schedule_for(task.row_work, task.device)
    batch = loop.batch or batch
    rate = relative_learning_rate(task.parameters) * settings.rate / RELATIVE_STEP
    return Schedule(
        steps=min(steps, loop.steps or steps),
        batch=min(batch, len(task.train)),
        learning_rate=loop.learning_rate or rate,
        loop=loop.loop,
        replacement=True,
        validations=4,
        patience=None,
        keep="complete",
        slower=(0.3, 0.3**2, 0.3**3),
    )


def _unpruned(parameter: Tensor) -> Tensor | None:
    """1 where a pruned weight is not 0, so that its zeros stay; None if it is not pruned."""
    mask = parameter.detach() != 0
    pruned = parameter.ndim > 1 and float(mask.float().mean()) < 1 - _PRUNED
    return mask.to(parameter.dtype) if pruned else None

"""Relearn time: how many training steps bring the forgotten classes back.

A model that hides a class relearns it in a few steps; one that never saw it has to learn it. The
ratio to the golden model is the Anamnesis Index (Chundawat et al., 2201.05629).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.multi_label import predicted
from ...runtime.torch_settings import torch_defaults
from ...splitting.batch_dim import BoundaryTensors
from .audited_model import AuditedModel, variant
from .context import AuditContext, TrainTestSplit
from .result import GOLDEN, ORIGINAL, TRAINED_WORDS, Row, Trained

# Adam's learning rate and the batch size; half of each batch is of forgotten classes.
LEARNING_RATE, BATCH = 1e-3, 32
# Multiply-adds per model above which relearning all weights is left out by default on a CPU.
_MAX_CPU_MULTIPLY_ADDS = 2e12
# FA that counts as relearned, as a share of the original's (alpha = 20 % in 2201.05629's terms).
# At 0.5 to 0.7 the first steps, which all models need, hide the difference between a model that
# saw the classes and one that did not; at 0.9 the original itself needs luck (on CIFAR-10).
GOAL = 0.8
# Relearning at least this share of the golden model's steps passes.
MIN_INDEX = 0.5
# Steps if the caller sets none.
DEFAULT_STEPS = 100
# At most this many forgotten and this many retained classes take part, drawn with the seed.
MAX_CLASSES = 20


@dataclass(frozen=True)
class RelearnTask:
    """Images to relearn from and to measure on, and the goal.

    Attributes:
        images, labels: the shots, [N, ...] and int64 [N], of forgotten and retained classes; of a
            multi-label model, bool [N, C].
        test_images, test_labels: of forgotten classes only, disjoint from the shots.
        forget: the forgotten classes.
        goal: FA, in per cent, at which the classes count as relearned.
        max_steps: give up after this many steps.
        seed: of the order of the shots, the same for every model.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    forget: list[int]
    goal: float
    max_steps: int
    seed: int

    def forgotten(self) -> Tensor:
        """The shots that have a forgotten class, bool [N]."""
        if self.labels.ndim == 2:
            return self.labels[:, self.forget].any(1)
        return torch.isin(self.labels, torch.tensor(self.forget))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of the softmax, or of the sigmoids."""
        if labels.ndim == 2:
            return F.binary_cross_entropy_with_logits(logits, labels.float())
        return F.cross_entropy(logits, labels)

    def recognised(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Which of the test images, or of their labels of forgotten classes, are, bool [n]."""
        if labels.ndim == 2:
            return predicted(logits)[:, self.forget][labels[:, self.forget]]
        return logits.argmax(1) == labels


@dataclass
class RelearnResult:
    """The course of relearning.

    Attributes:
        steps: until the goal was reached; None if it was not reached in ``max_steps``.
        accuracy: the last value compared with the goal: FA in per cent, mean of three.
        curve: (step, FA) pairs.
    """

    steps: int | None
    accuracy: float
    curve: list[tuple[int, float]]


class HasRows(Protocol):
    """What an audit's results are added to."""

    rows: dict[str, Row]
    notes: list[str]


def relearn_all(context: AuditContext, split: TrainTestSplit, one_set: bool) -> None:
    """Adds relearn times and Anamnesis Indices to every row.

    If the split is of ``one_set``, the images of the forgotten classes are divided here.
    """
    relearn_task(context, _make_task(context, split, one_set))


def relearn_task(context: AuditContext, task: RelearnTask | str) -> None:
    """Adds them to every row; ``task`` may be the reason why there is none."""
    for trained in TRAINED_WORDS:
        reason = task if isinstance(task, str) else ""
        if isinstance(task, RelearnTask) and trained == "full":
            given = context.settings["relearn_steps"] is not None
            reason = too_costly(context.multiply_adds, context.device, task, given)
        if isinstance(task, RelearnTask) and not reason:
            _relearn_models(context, task, trained)
            continue
        for _, row in context.measured():
            for key in (f"relearn_{trained}_steps", f"relearn_{trained}_fa", f"ain_{trained}"):
                row.put(key, None, reason)


def too_costly(
    multiply_adds: int, device: torch.device, task: RelearnTask, steps_given: bool
) -> str:
    """Says why relearning all weights is left out without ``relearn_steps``, or returns ""."""
    cost = 3 * multiply_adds * BATCH * task.max_steps
    if steps_given or device.type != "cpu" or cost <= _MAX_CPU_MULTIPLY_ADDS:
        return ""
    return (
        f"it would take {cost:.1e} multiply-adds per model on a CPU; pass "
        f"relearn_steps={DEFAULT_STEPS} to run it"
    )


def _relearn_models(context: AuditContext, task: RelearnTask, trained: Trained) -> None:
    steps: dict[str, int | None] = {}
    memo: dict[str, RelearnResult] = {}
    for audited, row in context.measured():
        start = _start_hash(audited, context.forget)  # a mask starts where the original does
        if start not in memo:
            memo[start] = relearn(audited, task, trained)
        result = memo[start]
        steps[row.name] = result.steps
        row.relearning[trained] = result.curve
        row.put(f"relearn_{trained}_steps", result.steps or task.max_steps)
        row.put(f"relearn_{trained}_fa", result.accuracy)
    add_anamnesis_index(context, trained, steps, task.max_steps)


def add_anamnesis_index(
    context: HasRows, trained: Trained, steps: dict[str, int | None], max_steps: int
) -> None:
    """Adds the ratio of each model's relearn time to the golden model's, if there is one.

    ``steps``: model's name -> steps to relearn, None if it took more than ``max_steps``.
    """
    if GOLDEN not in steps:
        return
    key, golden = f"ain_{trained}", steps[GOLDEN]
    for name, count in steps.items():
        row = context.rows[name]
        if name == GOLDEN:
            row.put(key, 1.0)
        elif count is None and golden is None:
            row.put(key, None, f"neither it nor the golden model relearned in {max_steps} steps")
        elif golden is None and (count or max_steps) >= MIN_INDEX * max_steps:
            row.put(key, None, f"the golden model did not relearn in {max_steps} steps, so the "
                               f"index may lie on either side of {MIN_INDEX}; raise relearn_steps, "
                               f"and shots (from few images it may never learn)")  # fmt: skip
        else:
            row.put(key, (count or max_steps) / (golden or max_steps))
    if golden is None:
        context.notes.append(
            f"the golden model did not relearn in {max_steps} steps ({TRAINED_WORDS[trained]}), so "
            f"the indices shown are upper bounds"
        )


def _make_task(context: AuditContext, split: TrainTestSplit, one_set: bool) -> RelearnTask | str:
    """Returns the task, or the reason why there is none."""
    max_steps, shots = context.settings["relearn_steps"], context.settings["shots"]
    if max_steps == 0:
        return "relearn_steps=0 leaves it out"
    classes = context.subset(context.forget, MAX_CLASSES)
    train, test = split.train, split.test
    labels, test_labels = train.labels[train.image_index], test.labels[test.image_index]
    empty = labels[:0]
    train_rows, test_rows = [empty], [empty]
    if not one_set:
        test_rows = [context.forget_mask[test_labels].nonzero()[:, 0]]
    for c in labels.unique().tolist():
        rows, count = (labels == c).nonzero()[:, 0], shots
        if one_set and context.forget_mask[c]:
            count = min(shots, len(rows) // 2)
            test_rows.append(rows[count:])
        train_rows.append(rows[:count])
    chosen, tested = torch.cat(train_rows), torch.cat(test_rows)
    shot_labels = labels[chosen]
    if not set(classes) <= set(shot_labels.tolist()) or not len(tested):
        return "too few images: it needs shots of each forgotten class and others to test on"
    evaluation = context.rows[ORIGINAL].evaluation
    assert evaluation is not None  # there are images
    before = sum(evaluation.per_class.get(c, 0.0) for c in classes) / len(classes)
    if not before:
        return "the original's FA is 0, so there is nothing to relearn"
    per_class = torch.bincount(shot_labels)[torch.tensor(classes)]
    context.settings["shots_used"] = int(per_class.min())
    return RelearnTask(
        images=train.images[chosen],
        labels=shot_labels,
        test_images=test.images[tested],
        test_labels=test_labels[tested],
        forget=context.forget,
        goal=GOAL * before,
        max_steps=DEFAULT_STEPS if max_steps is None else max_steps,
        seed=context.seed,
    )


def relearn(audited: AuditedModel, task: RelearnTask, trained: Trained) -> RelearnResult:
    """Trains a copy of ``audited`` on the shots until it recognises the forgotten classes again.

    First the last layer's rows of the forgotten classes are set to the mean of the other rows, in
    every model alike: whoever relearns a model can reset these rows, and a bias of -1e9 must not
    pass for deep forgetting.
    """
    model = variant(audited, audited.name, copy_backbone=True)
    _reset_rows(model.last_layer, task.forget)
    shots, test = task.images.to(model.device), task.test_images.to(model.device)
    with torch_defaults():
        if trained == "full":
            return train_on_shots(
                model.model, (shots,), (test,), list(model.model.parameters()), task
            )
        named = dict(model.model.module.named_parameters())
        parameters = [named[name] for name in model.split.parameters]
        features = model.split.features  # the backbone is frozen: it runs once
        return train_on_shots(model.split.tail, features(shots), features(test), parameters, task)


def _start_hash(audited: AuditedModel, forget: list[int]) -> str:
    """A hash of the weights that relearning starts from: equal ones share one run."""
    digest = hashlib.sha256()
    for parameter in audited.last_layer.parameters():
        retained = parameter.detach()[_retained_rows(parameter, forget)]
        digest.update(retained.cpu().contiguous().numpy().tobytes())
    return audited.backbone_hash + digest.hexdigest()


def train_on_shots(
    model: nn.Module,
    shots: BoundaryTensors,
    test: BoundaryTensors,
    parameters: list[nn.Parameter],
    task: RelearnTask,
) -> RelearnResult:
    """Trains ``parameters`` of ``model`` in place until the goal of ``task``, or to its last step.

    ``shots`` and ``test`` are what the model takes of the task's images.
    """
    device = shots[0].device
    labels, test_labels = task.labels.to(device), task.test_labels.to(device)
    forgotten = task.forgotten()
    pools = [p for p in (forgotten.nonzero()[:, 0], (~forgotten).nonzero()[:, 0]) if len(p)]
    draw = torch.Generator().manual_seed(task.seed)
    optimiser = torch.optim.Adam(parameters, LEARNING_RATE)

    @torch.no_grad()
    def accuracy() -> float:
        batches = zip(*[t.split(250) for t in (*test, test_labels)], strict=True)
        found = torch.cat([task.recognised(model(*part), own) for *part, own in batches])
        return 100 * float(found.float().sum()) / len(found)

    def smoothed() -> float:
        """The mean of the last three measurements: a single one may pass the goal by chance."""
        last = [fa for _, fa in curve[-3:]]
        return sum(last) / len(last)

    curve = [(0, accuracy())]
    for step in range(1, task.max_steps + 1):
        chosen = torch.cat(
            [p[torch.randint(len(p), (BATCH // len(pools),), generator=draw)] for p in pools]
        ).to(device)
        optimiser.zero_grad()
        task.loss(model(*[f[chosen] for f in shots]), labels[chosen]).backward()
        optimiser.step()
        # after each of the first 10 steps, then every 10 % more, and at the end
        if step <= 10 or step % (step // 10) == 0 or step == task.max_steps:
            curve.append((step, accuracy()))
            if smoothed() >= task.goal:
                return RelearnResult(step, smoothed(), curve)
    return RelearnResult(None, smoothed(), curve)


def _reset_rows(last_layer: nn.Module, forget: list[int]) -> None:
    """Sets the forgotten classes' weights and biases to the mean of the other classes'."""
    with torch.no_grad():
        for parameter in last_layer.parameters():
            retained = _retained_rows(parameter, forget)
            parameter[~retained] = parameter[retained].mean(0)


def _retained_rows(parameter: Tensor, forget: list[int]) -> Tensor:
    """Returns a bool mask of the rows to keep: all if the parameter has not one row per class."""
    retained = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
    if len(parameter) > max(forget):
        retained[forget] = False
    return retained

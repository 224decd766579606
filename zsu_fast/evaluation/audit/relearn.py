"""Relearn time: how many training steps bring a forgotten class back.

A model that hides a class relearns it in a few steps; one that never saw it has to learn it. The
ratio to the golden model is the Anamnesis Index (Chundawat et al., 2201.05629).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models.input_spec import InputSpec
from ...runtime.torch_defaults import torch_defaults
from ...splitting.batch_dim import Features
from .audited_model import AuditedModel, variant

# Adam's learning rate, and rows a step, half of them of forgotten classes.
RATE, BATCH = 1e-3, 32


@dataclass(frozen=True)
class RelearnTask:
    """What is relearned from and measured on.

    Attributes:
        images, labels: the shots, [N, ...] and int64 [N], of forgotten and other classes.
        test_images, test_labels: of the forgotten classes only, other images than the shots.
        forget: the forgotten classes.
        goal: FA, in per cent, at which the classes count as relearned.
        most: steps after which it is given up.
        seed: of the order of the shots, the same for every subject.
        spec: the images that the models take.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    forget: list[int]
    goal: float
    most: int
    seed: int
    spec: InputSpec


@dataclass
class Relearned:
    """How it went.

    Attributes:
        steps: until the goal was reached; None if it was not within the lesson's ``most``.
        accuracy: FA in per cent, at the goal or at the end, as it is compared with the goal.
        curve: (step, FA) pairs.
    """

    steps: int | None
    accuracy: float
    curve: list[tuple[int, float]]


def relearn(subject: AuditedModel, lesson: RelearnTask, everything: bool) -> Relearned:
    """Trains a copy of ``subject`` on the shots until it answers the forgotten classes again.

    First the last layer's rows of the forgotten classes are set to the mean of the other rows,
    in every subject alike. Whoever relearns a model does not care what was left in these rows, and
    a bias of -1e9 must not pass for deep forgetting.

    Args:
        subject: it is not changed.
        lesson: shots, test images, goal.
        everything: train all weights; False trains the last layer alone.
    """
    pupil = variant(subject, subject.name, lesson.spec, own=True)
    _fresh_rows(pupil.last, lesson.forget)
    device = next(pupil.model.parameters()).device
    shots, test = lesson.images.to(device), lesson.test_images.to(device)
    with torch_defaults():
        if everything:
            parameters = list(pupil.model.parameters())
            return _train(pupil.model, (shots,), (test,), parameters, lesson)
        named = dict(pupil.model.module.named_parameters())
        parameters = [named[name] for name in pupil.cut.parameters]
        features = pupil.cut.features  # they stand still: the backbone runs once
        tail = pupil.cut.tail
        return _train(tail, features(shots), features(test), parameters, lesson)


def start_of(subject: AuditedModel, forget: list[int]) -> str:
    """A hash of the weights that relearning starts from: equal ones need one run."""
    kept = []
    for parameter in subject.last.parameters():
        keep = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
        if len(parameter) > max(forget):
            keep[forget] = False
        kept.append(parameter.detach()[keep].cpu().contiguous().numpy().tobytes())
    return subject.backbone + hashlib.sha256(b"".join(kept)).hexdigest()


def _train(
    model: nn.Module,
    shots: Features,
    test: Features,
    parameters: list[nn.Parameter],
    lesson: RelearnTask,
) -> Relearned:
    device = shots[0].device
    labels, want = lesson.labels.to(device), lesson.test_labels.to(device)
    forgotten = torch.isin(lesson.labels, torch.tensor(lesson.forget))
    pools = [p for p in (forgotten.nonzero()[:, 0], (~forgotten).nonzero()[:, 0]) if len(p)]
    draw = torch.Generator().manual_seed(lesson.seed)
    optimiser = torch.optim.Adam(parameters, RATE)

    @torch.no_grad()
    def accuracy() -> float:
        right = [
            (model(*part).argmax(1) == own).float().sum()
            for *part, own in zip(*[t.split(250) for t in (*test, want)], strict=True)
        ]
        return 100 * float(sum(right)) / len(want)

    def reached() -> float:
        """The mean of the last three looks: one alone may be above the goal by luck."""
        last = [fa for _, fa in curve[-3:]]
        return sum(last) / len(last)

    curve = [(0, accuracy())]
    for step in range(1, lesson.most + 1):
        chosen = torch.cat(
            [p[torch.randint(len(p), (BATCH // len(pools),), generator=draw)] for p in pools]
        ).to(device)
        optimiser.zero_grad()
        F.cross_entropy(model(*[f[chosen] for f in shots]), labels[chosen]).backward()
        optimiser.step()
        if _looks(step) or step == lesson.most:
            curve.append((step, accuracy()))
            if reached() >= lesson.goal:
                return Relearned(step, reached(), curve)
    return Relearned(None, reached(), curve)


def _looks(step: int) -> bool:
    """Whether FA is measured after this step: each of the first 10, then every tenth more."""
    return step <= 10 or step % max(1, step // 10) == 0


def _fresh_rows(last: nn.Module, forget: list[int]) -> None:
    """Sets the forgotten classes' weights and biases to the mean of the other classes'."""
    with torch.no_grad():
        for parameter in last.parameters():
            if len(parameter) <= max(forget):
                continue  # no row a class: left as it is
            keep = torch.ones(len(parameter), dtype=torch.bool, device=parameter.device)
            keep[forget] = False
            parameter[~keep] = parameter[keep].mean(0)

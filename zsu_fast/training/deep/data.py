"""Rows for deep forgetting: impressions, mixtures, and dead-leaves images at the split."""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.input_spec import InputSpec
from ...models.wrapper import LogitsModel
from ...runtime.flops import multiply_adds
from ...runtime.progress import Reporter
from ...splitting.split import Split
from ...synthesis.ascent_settings import AscentSettings
from ...synthesis.dead_leaves import dead_leaves_chunks
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import input_space
from ...synthesis.synthesize import ascend
from ..features import FeatureSet
from ..teacher import Teacher, build_feature_set
from .settings import DeepSettings


def make_deep_rows(
    model: LogitsModel,
    spec: InputSpec,
    cut: Split,
    made: ClassImpressions,
    forget: Tensor,
    seed: int,
    settings: DeepSettings,
) -> tuple[FeatureSet, FeatureSet, int]:
    """Training rows, held-out rows, and how many of the former, the first ones, are impressions."""
    device = forget.device
    labels = made.labels.to(device)
    impressions = cut.features(made.images.to(device))
    scenery = _scenery(model, spec, cut, made.labels.unique(), forget, seed, settings)
    held = torch.empty(len(labels), dtype=torch.bool, device=device)
    held[labels.argsort(stable=True)] = torch.arange(len(labels), device=device) % 4 == 3
    held_scenes = torch.arange(len(scenery[0]), device=device) % 8 == 7
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for one, other, mixtures in (
        (~held, ~held_scenes, settings.mixtures),
        (held, held_scenes, settings.mixtures // 4),
    ):
        picked = tuple(f[one] for f in impressions)
        near = build_feature_set(
            Teacher(cut.tail, forget), picked, labels[one], mixtures, generator
        )
        near = near.select(torch.arange(len(near), device=device))
        far = tuple(f[other] for f in scenery)
        with torch.no_grad():
            chunks = zip(*[f.split(256) for f in far], strict=True)
            teacher = torch.cat([cut.tail(*chunk) for chunk in chunks])
        top = teacher.argmax(1)
        sides.append(_join([near, FeatureSet(far, teacher, top, forget[top])]))
    return sides[0], sides[1], int((~held).sum())


def _scenery(
    model: LogitsModel,
    spec: InputSpec,
    cut: Split,
    classes: Tensor,
    forget: Tensor,
    seed: int,
    settings: DeepSettings,
) -> tuple[Tensor, ...]:
    """Scenes pushed to ``classes``, and scenes as drawn, at the cut; drawn a few at a time."""
    bounds = (1, -1, 1, 1) if len(spec.shape) == 3 else (1, -1)
    low, high = spec.low.view(bounds), spec.high.view(bounds)
    grey = torch.zeros(1, *spec.shape, device=forget.device)
    values = sum(f.numel() for f in cut.features(grey))
    work = multiply_adds(model, grey)
    scenes, pushed = settings.scenes_for(values, len(forget), work, forget.device)
    targets = _targets(classes, forget.cpu(), pushed)
    few = AscentSettings(pushed // len(targets), (0.3, 0.99), 40, 0, 0.02, 0.0, seed)
    wanted = len(targets) * few.per_class
    first, missing, seen = [], wanted, []
    for chunk in dead_leaves_chunks(scenes, spec.shape, seed):
        chunk = low + chunk * (high - low)
        if missing > 0:
            first.append(chunk[:missing])
            missing -= len(chunk)
        seen.append(cut.features(chunk.to(forget.device)))
    starts = torch.cat(first)
    starts = starts[torch.arange(wanted) % len(starts)]
    space = input_space(model, spec, few.precision)
    ascended = ascend(model, space, targets, few, Reporter(False), init=starts)
    seen.insert(0, cut.features(ascended.images.to(forget.device)))
    return tuple(torch.cat(column) for column in zip(*seen, strict=True))


def _targets(classes: Tensor, forget: Tensor, most: int) -> list[int]:
    """Classes to push scenes to: all, or as many; half of them forgotten ones, if there are."""

    def evenly(some: Tensor, count: int) -> Tensor:
        return some[torch.linspace(0, len(some) - 1, min(count, len(some))).long()]

    if len(classes) <= most:
        return sorted(classes.tolist())
    gone = evenly(classes[forget[classes]], most // 2)
    kept = evenly(classes[~forget[classes]], most - len(gone))
    return sorted([*gone.tolist(), *kept.tolist()])


def _join(parts: list[FeatureSet]) -> FeatureSet:
    features = zip(*[p.features for p in parts], strict=True)
    return FeatureSet(
        tuple(torch.cat(column) for column in features),
        torch.cat([p.teacher for p in parts]),
        torch.cat([p.label for p in parts]),
        torch.cat([p.forgotten for p in parts]),
    )

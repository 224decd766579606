"""Rows for deep forgetting: impressions, mixtures of them, and dead-leaves images at the split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.input_spec import InputSpec
from ...models.wrapper import LogitsModel
from ...runtime.measuring import multiply_adds
from ...runtime.progress import Reporter
from ...splitting.split import Split
from ...synthesis.ascent_settings import AscentSettings
from ...synthesis.dead_leaves import dead_leaves_chunks
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import input_space
from ...synthesis.synthesize import ascend
from ..features import FeatureSet, held_out
from ..teacher import Teacher, build_feature_set
from .settings import DeepSettings

_CHUNK = 256  # dead-leaves images that the tail labels at once
_SCENE_VALIDATION = 8  # one dead-leaves image in this many is held out


@dataclass(frozen=True)
class DeepInputs:
    """What deep forgetting starts from."""

    model: LogitsModel  # the working copy that `split` shares its parameters with
    spec: InputSpec
    split: Split  # from `find_deep_split`
    impressions: ClassImpressions  # of all classes
    forget: Tensor  # bool [C]
    seed: int  # of everything random


def deep_train_val_sets(
    inputs: DeepInputs, settings: DeepSettings
) -> tuple[FeatureSet, FeatureSet, int]:
    """Returns training rows, validation rows, and how many training rows are impressions.

    The impressions come first. `held_out` takes one in four of each class for validation, and none
    of a class with fewer than four: every class, forgotten ones included, then keeps an impression
    to train on. If none is held out at all, as with one impression for each of 1,000 classes,
    validation consists of other mixtures of the same impressions and of held-out dead-leaves
    images.
    """
    split, device = inputs.split, inputs.forget.device
    labels = inputs.impressions.labels.to(device)
    impressions = split.features(inputs.impressions.images.to(device))
    scenes = _dead_leaves_features(inputs, settings)
    held, place = held_out(labels), torch.arange(len(scenes[0]), device=device)
    held_scenes = place % _SCENE_VALIDATION == _SCENE_VALIDATION - 1
    generator = torch.Generator().manual_seed(inputs.seed)
    teacher = Teacher(split.tail, inputs.forget)

    def rows(mine: Tensor, mine_scenes: Tensor, mixtures: int, itself: bool = True) -> FeatureSet:
        chosen = tuple(f[mine] for f in impressions)
        near = build_feature_set(teacher, chosen, labels[mine], mixtures, generator, itself)
        near = near.select(torch.arange(len(near), device=device))
        far = tuple(f[mine_scenes] for f in scenes)
        with torch.no_grad():
            chunks = zip(*[f.split(_CHUNK) for f in far], strict=True)
            logits = torch.cat([split.tail(*chunk) for chunk in chunks])
        top = logits.argmax(1)
        return FeatureSet(
            tuple(torch.cat(pair) for pair in zip(near.features, far, strict=True)),
            torch.cat([near.teacher, logits]),
            torch.cat([near.label, top]),
            torch.cat([near.forgotten, inputs.forget[top]]),
        )

    train = rows(~held, ~held_scenes, settings.mixtures)
    some = bool(held.any())
    validation = rows(held if some else ~held, held_scenes, settings.mixtures // 4, itself=some)
    return train, validation, int((~held).sum())


def _dead_leaves_features(inputs: DeepInputs, settings: DeepSettings) -> tuple[Tensor, ...]:
    """Features at the split of dead-leaves images: first those optimised for a class by ascent."""
    model, spec, split = inputs.model, inputs.spec, inputs.split
    device = inputs.forget.device
    bounds = (1, -1, 1, 1) if len(spec.shape) == 3 else (1, -1)
    low, high = spec.low.view(bounds), spec.high.view(bounds)
    zeros = torch.zeros(1, *spec.shape, device=device)
    values = sum(f.numel() for f in split.features(zeros))
    work = multiply_adds(model, zeros)
    scenes, pushed = settings.scenes_for(values, len(inputs.forget), work, device)
    targets = target_classes(inputs.impressions.labels.unique(), inputs.forget.cpu(), pushed)
    ascent = AscentSettings(pushed // len(targets), (0.3, 0.99), 40, 0, 0.02, 0.0, inputs.seed)
    wanted = len(targets) * ascent.per_class
    starts, missing, features = [], wanted, []
    for chunk in dead_leaves_chunks(scenes, spec.shape, inputs.seed):
        chunk = low + chunk * (high - low)
        if missing > 0:
            starts.append(chunk[:missing])
            missing -= len(chunk)
        features.append(split.features(chunk.to(device)))
    init = torch.cat(starts)
    init = init[torch.arange(wanted) % len(init)]
    space = input_space(model, spec, ascent.precision)
    optimised = ascend(model, space, targets, ascent, Reporter(False), init=init)
    features.insert(0, split.features(optimised.images.to(device)))
    return tuple(torch.cat(column) for column in zip(*features, strict=True))


def target_classes(classes: Tensor, forget: Tensor, most: int) -> list[int]:
    """Classes to optimise images for: all, or ``most``, half of them forgotten if there are enough.

    ``classes`` are sorted, int64 [K]; ``forget`` is bool [C].
    """

    def evenly(candidates: Tensor, count: int) -> Tensor:
        count = min(count, len(candidates))
        return candidates[torch.linspace(0, len(candidates) - 1, count).long()]

    if len(classes) <= most:
        return sorted(classes.tolist())
    forgotten = evenly(classes[forget[classes]], most // 2)
    retained = evenly(classes[~forget[classes]], most - len(forgotten))
    return sorted([*forgotten.tolist(), *retained.tolist()])

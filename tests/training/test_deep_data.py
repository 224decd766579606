"""The rows of deep forgetting: what is held out, and which classes images are optimised for."""

from __future__ import annotations

import copy

import pytest
import torch
from support import tiny

from zsu_fast.models.wrapper import working_copy
from zsu_fast.synthesis.synthesize import synthesize
from zsu_fast.training.deep.data import DeepInputs, deep_train_val_sets, target_classes
from zsu_fast.training.deep.deep import find_deep_split
from zsu_fast.training.deep.settings import DeepSettings
from zsu_fast.training.features import held_out


@pytest.mark.parametrize("counts", [[1] * 5, [2, 3, 1, 3, 2], [4, 1, 3, 8, 2]])
def test_every_class_has_an_impression_in_training(counts: list[int]) -> None:
    """One in four of all impressions would be all of a class that has a single one."""
    original = tiny()
    many = synthesize(original, per_class=max(counts), input_shape=(3, 8, 8), progress=False)
    chosen = torch.cat([(many.labels == c).nonzero()[:n, 0] for c, n in enumerate(counts)])
    few = copy.copy(many)
    for name in ("images", "labels", "confidence", "target", "steps", "hit"):
        setattr(few, name, getattr(many, name)[chosen])
    model = working_copy(original, torch.device("cpu"))
    split = find_deep_split(model, "auto", few.images)
    forget = torch.arange(5) == 1
    inputs = DeepInputs(model, few.spec, split, few, forget, seed=0)
    settings = DeepSettings(scenes=256, pushed=64, mixtures=40)
    train, validation, impressions = deep_train_val_sets(inputs, settings)
    trained = train.label[:impressions].bincount(minlength=5).tolist()
    assert trained == [n - n // 4 for n in counts]
    held = sum(n // 4 for n in counts)
    scenes = len(train) + len(validation) - sum(counts) - 50
    assert len(validation) == held + 10 + scenes // 8
    (features,) = split.features(few.images[~held_out(few.labels)])
    (validated,) = validation.features
    distances = torch.cdist(validated.flatten(1), features.flatten(1))
    assert float(distances.min()) > 0  # no training impression is a validation row


def test_scenes_are_pushed_to_few_of_many_classes() -> None:
    forget = torch.zeros(1000, dtype=torch.bool)
    forget[100:900] = True
    classes = torch.arange(0, 1000, 2)
    got = target_classes(classes, forget, 100)
    assert len(set(got)) == 100
    assert set(got) <= set(classes.tolist())
    assert sum(bool(forget[c]) for c in got) == 50
    assert target_classes(classes, forget, 500) == classes.tolist()
    one_forgotten = target_classes(torch.arange(1000), torch.arange(1000) == 7, 100)
    assert 7 in one_forgotten
    assert len(one_forgotten) == 100

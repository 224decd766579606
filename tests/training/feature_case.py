"""A linear tail on four classes, two of them forgotten, and rows mixed from impressions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zsu_fast.training.features import FeatureSet
from zsu_fast.training.teacher import Teacher, build_feature_set

FORGET = torch.tensor([False, True, False, True])


def case(
    count: int = 12, mixtures: int = 200, seed: int = 0
) -> tuple[nn.Module, Tensor, FeatureSet]:
    """Returns the tail, the features of impressions, and rows mixed from them."""
    tail = nn.Linear(6, 4)
    features = torch.rand(count, 6) + 0.1
    label = torch.arange(count) % 4
    generator = torch.Generator().manual_seed(seed)
    rows = build_feature_set(Teacher(tail, FORGET), (features,), label, mixtures, generator)
    return tail, features, rows

"""What the tail is trained on and by which loss, from the impressions' features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .features import FeatureSet
from .losses import MaskedKL, Objective

# Of more classes than this, the forgotten ones' logits alone are computed, where they alone move.
SUBSET_ABOVE = 256


@dataclass
class FitTask:
    """What `train_tail` takes: see there."""

    tail: nn.Module
    parameters: list[nn.Parameter]
    rows: FeatureSet
    validation: FeatureSet
    objective: Objective
    validation_loss: MaskedKL
    generator: torch.Generator

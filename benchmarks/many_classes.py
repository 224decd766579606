"""Heads of 21,841 and 100,000 classes, 100 of them forgotten: time, memory, what is left.

    python benchmarks/many_classes.py              # both, about 5 minutes on 2 cores
    python benchmarks/many_classes.py --check      # exit 1 if a bar of the project is missed
    python benchmarks/many_classes.py --classes 5000 --forget 20

Each case runs in a process of its own, so that its peak resident memory is its own: from the start
of Python to the result, the model and imports included. The model is a stand-in (there are no
public weights of such a head here): a small convolutional trunk of random weights to 512 features,
and prototypes in groups of ten similar classes. Judged on impressions that the run never saw: of
another seed, of all forgotten classes and of retained ones with and without impressions of their
own; and on drawn scenes, which no impression was made from. Bars (100,000 classes): 4 GB, 3 minutes
on 2 cores, no held-out impression answered with a forgotten class. Writes
``results/many_classes.md`` and ``.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
from harness import RESULTS, machine
from torch import Tensor, nn

import zsu_fast
from zsu_fast.classifier import InputSpec
from zsu_fast.scenes import draw_scenes

FEATURES, GROUP = 512, 10
SPEC = InputSpec((3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "the benchmark")
MOST_BYTES, MOST_SECONDS = 4e9, 180.0


class ManyClasses(nn.Module):
    """float [N, 3, 32, 32] -> [N, classes]: three convolutions, 512 features, one linear layer."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(
                nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(),
                nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
                nn.Conv2d(128, FEATURES, 3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                nn.Linear(4 * FEATURES, FEATURES), nn.BatchNorm1d(FEATURES), nn.ReLU(),
            )  # fmt: skip
            self.fc = nn.Linear(FEATURES, classes)
            self.input_spec = SPEC
            self._settle(classes)
        self.eval()

    @torch.no_grad()
    def _settle(self, classes: int) -> None:
        """BatchNorm statistics from scenes; prototypes near those of their group."""
        images = SPEC.low.view(-1, 1, 1) + draw_scenes(256, SPEC.shape, 0) * (
            SPEC.high - SPEC.low
        ).view(-1, 1, 1)
        for module in self.trunk:
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.momentum = None  # the mean of what it sees
        self.trunk.train()
        self.trunk(images)
        self.trunk.eval()
        centres = torch.randn(-(-classes // GROUP), FEATURES)
        for start in range(0, classes, 10_000):
            rows = torch.arange(start, min(start + 10_000, classes))
            own = torch.randn(len(rows), FEATURES)
            self.fc.weight[rows] = (0.6 * centres[rows // GROUP] + 0.8 * own) * 2 / FEATURES**0.5
        self.fc.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.trunk(x))
        return logits

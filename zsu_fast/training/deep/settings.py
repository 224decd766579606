"""Depth, and the constants of deep forgetting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ...errors import ArgumentError

Depth = Literal["output", "deep"]
DEPTHS: tuple[str, ...] = get_args(Depth)
_SCENE_VALUES = 256 * 1024 * 1024  # of features at the cut that are kept: 1 GB
_SCENE_LOGITS = 128 * 1024 * 1024  # of them that are kept: 1,342 scenes for 100,000 classes
_SCENE_WORK = 1e12  # multiply-adds on all scenes on a CPU: 2,500 of 224 pixels for a small network
_WORK = 5e12  # multiply-adds of all steps' forward passes on a CPU: minutes on one thread
_FEWEST_STEPS = 100  # however much work a step is


@dataclass(frozen=True)
class DeepSettings:
    """Constants of deep forgetting, chosen on training images (benchmarks/results).

    Attributes:
        scenes: drawn images, at most.
        scenes_per_layer: so many for each trained layer, since a deeper tail has more to keep; fewer
            where they cost much, 256 at least.
        pushed: of them, started an ascent to a class from; fewer in proportion, 256 at least.
        mixtures: of impressions at the cut (`build_feature_set`), which say what no scene does where
            images are no photographs.
        steps, batch: optimiser steps, and rows in each.
        steps_per_layer: so many steps are enough for each trained layer; and fewer, not below 100,
            where they would keep a CPU busy for long.
        unmask: weight of the frozen original last layer's divergence.
        shrink: weight of the features' mean square, in units of the original's.
        shrink_inside: the same where evidence is erased inside too: both cost retained classes.
        erase: weight of the explained variance of the forgotten logits.
        inside: its weight in what each inner layer takes (`DualClassifierTail`), up to three; of more, all
            share that.
        ridge: of that regression, in units of the features' mean variance.
    """

    scenes: int = 12000
    scenes_per_layer: int = 2000
    pushed: int = 3000
    mixtures: int = 512
    steps: int = 1500
    steps_per_layer: int = 300
    batch: int = 256
    unmask: float = 0.3
    shrink: float = 0.15
    shrink_inside: float = 0.1
    erase: float = 0.35
    inside: float = 0.25
    ridge: float = 0.1

    def fit_to(self, layers: int) -> DeepSettings:
        """What so many trained layers need of all this."""
        scenes = min(self.scenes, self.scenes_per_layer * layers)
        return replace(
            self,
            scenes=scenes,
            pushed=self.pushed * scenes // self.scenes,
            steps=min(self.steps, self.steps_per_layer * layers),
        )

    def scenes_for(
        self, values: int, classes: int, work: int, device: torch.device
    ) -> tuple[int, int]:
        """(scenes, pushed) where each has so many feature values, logits and multiply-adds."""
        scenes = min(self.scenes, _SCENE_VALUES // values, _SCENE_LOGITS // classes)
        if device.type == "cpu":
            scenes = min(scenes, int(_SCENE_WORK / max(1, work)))
        return max(256, scenes), max(256, self.pushed * scenes // self.scenes)

    def steps_for(self, row: int, device: torch.device) -> int:
        """Steps, where a row takes so many multiply-adds in the trained layers."""
        if device.type != "cpu":
            return self.steps
        return min(self.steps, max(_FEWEST_STEPS, int(_WORK / (self.batch * max(1, row)))))


def check_depth(depth: str, objective: str, space: str) -> None:
    """Raises where there is no such depth, or the objective does not go with it.

    Raises:
        ArgumentError: as said.
    """
    if depth not in DEPTHS:
        raise ArgumentError("depth", f"got {depth!r}", f"Pass one of {', '.join(DEPTHS)}.")
    if depth == "deep" and space != "input":
        raise ArgumentError(
            "space", f"got {space!r} with depth='deep', which needs images", "Pass space='input'."
        )
    if depth == "deep" and objective != "masked":
        raise ArgumentError(
            "objective",
            f"got {objective!r} with depth='deep', which has an objective of its own",
            "Leave objective out, or pass depth='output'.",
        )

"""The depth option, and the constants of deep forgetting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from ...errors import ArgumentError, check_choice

Depth = Literal["output", "deep"]
DEPTHS: tuple[str, ...] = get_args(Depth)
_SCENE_VALUES = 256 * 1024 * 1024  # features at the split that are stored for scenes: 1 GB
_SCENE_LOGITS = 128 * 1024 * 1024  # logits stored for scenes: 1,342 scenes for 100,000 classes
_SCENE_WORK = 1e12  # multiply-adds for all scenes on a CPU: 2,500 of 224 pixels, small network
_WORK = 5e12  # multiply-adds of all steps' forward passes on a CPU: minutes on one thread
_FEWEST_SCENES = 256  # even if they cost more than that
_FEWEST_STEPS = 100  # likewise


@dataclass(frozen=True)
class DeepSettings:
    """Constants of deep forgetting, chosen on training images (benchmarks/results).

    A *scene* is a dead-leaves image: overlapping shapes of random size, place and colour.

    Attributes:
        scenes: number of scenes, at most.
        scenes_per_layer: scenes for each trained layer, since a deeper tail has more to preserve;
            fewer, but at least 256, if they cost much.
        pushed: number of additional scenes that a few ascent steps optimise for a class; reduced in
            proportion to ``scenes``, but at least 256.
        mixtures: rows mixed from impressions at the split (`build_feature_set`), for models of
            inputs that are no photographs.
        steps, batch: optimiser steps, at most, and rows in each.
        steps_per_layer: steps for each trained layer; fewer, but at least 100, if they would keep
            a CPU busy for long.
        unmask, shrink, erase, inside: weights of the loss's terms, see `DeepObjective`.
        shrink_inside: replaces ``shrink`` if there are inner layers: that term and ``inside`` both
            cost retained accuracy.
        ridge: of the ridge regression, relative to the features' mean variance.
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
        """The settings for ``layers`` trained layers."""
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
        """Returns (scenes, pushed) within memory and time on ``device``.

        A scene has ``values`` features and ``classes`` logits and takes ``work`` multiply-adds.
        """
        scenes = min(self.scenes, _SCENE_VALUES // values, _SCENE_LOGITS // classes)
        if device.type == "cpu":
            scenes = min(scenes, int(_SCENE_WORK / max(1, work)))
        pushed = self.pushed * scenes // self.scenes
        return max(_FEWEST_SCENES, scenes), max(_FEWEST_SCENES, pushed)

    def steps_for(self, row_work: int, device: torch.device) -> int:
        """Optimiser steps if a row takes ``row_work`` multiply-adds in the trained layers."""
        if device.type != "cpu":
            return self.steps
        affordable = int(_WORK / (self.batch * max(1, row_work)))
        return min(self.steps, max(_FEWEST_STEPS, affordable))


def check_depth(depth: str, objective: str, space: str) -> None:
    """Raises unless ``depth`` is known and goes with ``objective`` and ``space``.

    Raises:
        ArgumentError: there is no such depth, or depth="deep" with another objective than "masked"
            or another space than "input".
    """
    check_choice("depth", depth, DEPTHS)
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

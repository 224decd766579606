"""The depth option, and the constants of deep forgetting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ...errors import ArgumentError, check_choice

Depth = Literal["output", "deep"]
DEPTHS: tuple[str, ...] = get_args(Depth)
ForgottenAs = Literal["stranger", "redistribute"]
FORGOTTEN_AS: tuple[str, ...] = get_args(ForgottenAs)
# Multiply-adds of forward passes on a CPU, minutes on one thread each: of the backbone on all
# scenes, of all ascent steps of the inverted rows, of all optimiser steps, and of one of them.
_SCENE_WORK, _ASCENT_WORK, _FIT_WORK, _STEP_WORK = 1e12, 5e12, 5e12, 2e10
_MORE_ERASED = 5  # factor on the erase term where it has further targets
_FINER = 1.2, 1.3, 1.5  # factors besides the usual ones, where the leak is known that well
_VALUES = 64 * 1024 * 1024  # features, or logits, that are stored for a kind of rows: 256 MB
_SMALL = 64 * 64  # pixels of an image
_FEWEST_SCENES, _FEWEST_INVERTED, _FEWEST_STEPS, _SMALLEST_BATCH = 512, 256, 100, 64


@dataclass(frozen=True)
class DeepSettings:
    """Constants of deep forgetting, chosen on training images (benchmarks/results).

    A *scene* is a dead-leaves image: overlapping shapes of random size, place and colour. An
    *inverted row* is a row of boundary tensors that ascent steps have optimised for a class.

    Attributes:
        scenes: number of scenes; fewer if they cost much, but at least 512, or 256 of huge ones.
        large_scenes: the same for images of more than 64 pixels.
        inverted: number of inverted rows; more if there are many classes (`inverted_for`).
        inverted_per_class: the latter, on average.
        ascent_steps: most steps that an inverted row takes.
        ascent_step: length of the first of them, in standard deviations of the rows.
        statistics: weight of the distance from the BatchNorm statistics in the ascent.
        steps, batch: optimiser steps, and rows in each; fewer if they cost much.
        inverted_share: share of inverted rows in a batch.
        rate: learning rate, as a share of the weights' root mean square.
        betas: of AdamW.
        rounds: how many times the erase term is doubled, for a third of ``steps`` each, as long as
            the share of ``robust`` of the held-out scenes keeps its answer.
        margin: in logits, see `DeepObjective`; smaller if logits have a lower bound.
        keep, constant, erase, ridge, components, null_space: of the loss, see `DeepObjective`.
        factors: by which the change of the weights is multiplied: the first one at which the
            held-out inverted rows leak no more than ``leak``, or a larger one that is free.
        leak: share of held-out inverted rows.
        most_leak: the same, above which deep forgetting has failed.
        robust, robust_factor: a larger factor than needed, at most the second, is taken if this
            share of the held-out scenes, weighted by confidence, keeps its answer all the same.
        early_check: whether a quarter of the steps on a quarter of the inverted rows shows if it
            can't work, before the others are drawn.
        multi_label: whether each class has a sigmoid of its own.
        stranger: whether forgotten identities become strangers, see `StrangerObjective`.
        stranger_rate: false accept rate of the threshold of a stranger in training: higher than one
            of 1 %, so that the threshold is lower, as real images exceed what inverted rows do.
        stranger_margin: in logits, how far below it a stranger's logits are to be.
        stranger_share: share of inverted rows in a batch then, at least; twice that with many
            identities.
    """

    scenes: int = 5120
    large_scenes: int = 2560
    inverted: int = 1024
    inverted_per_class: float = 7.2
    ascent_steps: int = 15
    ascent_step: float = 0.3
    statistics: float = 2.5
    steps: int = 200
    batch: int = 224
    inverted_share: float = 0.2
    rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.99)
    margin: float = 4.0
    keep: float = 16.0
    constant: float = 2.0
    erase: float = 2.0
    ridge: float = 0.1
    components: int = 0
    null_space: float = 0.0
    rounds: int = 0
    factors: tuple[float, ...] = (1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0, 2.25, 2.5)
    leak: float = 0.08
    most_leak: float = 0.4
    robust: float = 0.92
    robust_factor: float = 1.4
    early_check: bool = False
    multi_label: bool = False
    stranger: bool = False
    stranger_rate: float = 0.3
    stranger_margin: float = 4.0
    stranger_share: float = 0.4

    def for_model(
        self, model: nn.Module, classes: int, forget: int, multi_label: bool, stranger: bool
    ) -> DeepSettings:
        """The settings for a model of that many classes, ``forget`` of them to forget."""
        settings = self.for_classes(classes)
        few = classes <= self.batch and not multi_label
        if few and layer_norms_alone(model):
            settings = settings.for_layer_norm()
        elif few and not stranger:
            settings = settings.for_batch_norm() if has_batch_norm(model) else settings
            settings = settings.for_single_class() if forget == 1 else settings
        # The features of SqueezeNet can't lose the classes, and the rows are half of a call's cost.
        early = classes > self.batch and not stranger and not has_norm(model)
        settings = replace(settings, multi_label=multi_label, early_check=early)
        return settings.for_strangers(classes) if stranger else settings

    def for_classes(self, classes: int) -> DeepSettings:
        """The settings for a model of that many classes.

        With more classes than rows in a batch, two thirds of them are inverted ones, which alone
        reach every class; there are twice as many steps; hardly any row may leak, as there are
        enough to tell (EfficientNet-lite0 on photographs: 0 to 1 % where 1 % of its rows leak); and
        nothing is erased: on the wider features of such models, a regression on a batch explains
        everything. Features that can't lose the classes (SqueezeNet: 19 % leak, RA 36 of 63) are
        given up sooner.
        """
        if classes <= self.batch:
            return self
        return replace(
            self, inverted_share=0.65, steps=2 * self.steps, constant=0.0, erase=0.0,
            robust_factor=0.0, leak=self.leak / 8, most_leak=0.1,
            factors=tuple(sorted({*self.factors, *_FINER})),
        )  # fmt: skip

    def for_layer_norm(self) -> DeepSettings:
        """The settings for a model of few classes with layer norms and no batch norms.

        Constant forgotten logits come cheap there: normalised features point elsewhere instead, and
        a probe reads that; extrapolation adds to it. Instead, fewer inverted rows, no such term, a
        larger margin, more and smaller steps, and more leak, of which images show little: on a
        compact ViT, the probe falls by 10 to 14 points instead of 3 to 5 (a single class: by 4).
        """
        return replace(
            self, keep=self.keep / 2, constant=0.0, inverted_share=self.inverted_share / 2,
            margin=2 * self.margin, steps=2 * self.steps, batch=2 * self.batch // 7,
            leak=1.5 * self.leak, robust_factor=0.0,
        )  # fmt: skip

    def for_batch_norm(self) -> DeepSettings:
        """The settings for a model of few classes with batch norms and a linear last layer.

        With the batch's own statistics, scenes vary as images do in each channel, so that what the
        retained classes don't need can be erased without harm to them; more and smaller steps do
        it, and more in rounds where that is possible: the probe falls by 15 to 26 points instead of
        8 to 13, RA by less. Without batch norms (LeNet5, KarpathyNet), the same costs 2 to 6 points
        of RA.
        """
        return replace(
            self, components=32, null_space=16.0, rounds=2, erase=_MORE_ERASED * self.erase,
            steps=3 * self.steps, batch=3 * self.batch // 7,
            inverted_share=self.inverted_share / 2, rate=1.5 * self.rate, robust_factor=0.0,
        )  # fmt: skip

    def without_components(self) -> DeepSettings:
        """The same with a constant null space, and without more of `for_batch_norm` in the loss."""
        if not self.components:
            return self
        return replace(self, components=0, rounds=0, erase=self.erase / _MORE_ERASED)

    def without_null_space(self) -> DeepSettings:
        """The same without what `for_batch_norm` adds to the loss."""
        return replace(self.without_components(), null_space=0.0)

    def for_single_class(self) -> DeepSettings:
        """The settings if one class of few is forgotten.

        Without others to tell it from, its logit need not be constant, and stricter leak does more
        for un-masking: five such requests in a row cost KarpathyNet 3.4 points of RA, not 8.3.
        """
        return replace(self, constant=0.0, leak=self.leak / 4, robust_factor=0.0, rounds=0)

    def for_strangers(self, classes: int) -> DeepSettings:
        """The settings for identities of a gallery of ``classes`` that are to become strangers.

        A photograph is more similar to its template than inverted rows are, so that hardly any of
        these may leak, and larger factors are tried. With many identities, more rows of a batch are
        inverted ones, of which there are fewer, as they take more steps each; and the retained
        logits are held less tightly: of 100 of 1,000 templates that are a single photograph each,
        34 % were recognised with the settings for as many classes.
        """
        many = classes > self.batch
        share = max(self.inverted_share, self.stranger_share * (2 if many else 1))
        return replace(
            self, stranger=True, inverted_share=share, keep=self.keep / 16 if many else self.keep,
            inverted_per_class=self.inverted_per_class / 4,
            leak=min(self.leak, DeepSettings.leak / 8), most_leak=DeepSettings.most_leak,
            factors=(*self.factors, 3.0, 4.0),
        )  # fmt: skip

    @property
    def most_steps(self) -> int:
        """Optimiser steps with all rounds."""
        return self.steps + self.rounds * (self.steps // 3)

    def scenes_for(
        self, pixels: int, values: int, classes: int, work: int, device: torch.device
    ) -> int:
        """Scenes within memory and time, a multiple of 512, or 256.

        Each has ``values`` features and takes ``work`` multiply-adds.
        """
        count = self.scenes if pixels <= _SMALL else self.large_scenes
        count = min(count, _VALUES // values, _VALUES // classes)
        if device.type == "cpu":
            count = min(count, int(_SCENE_WORK / max(1, work)))
        fewest = _FEWEST_SCENES if _FEWEST_SCENES * values <= 4 * _VALUES else _FEWEST_SCENES // 2
        return max(fewest, count // _FEWEST_SCENES * _FEWEST_SCENES)

    def inverted_for(self, values: int, classes: int, work: int, device: torch.device) -> int:
        """Inverted rows, within memory and time."""
        count = max(self.inverted, int(classes * self.inverted_per_class))
        count = min(count, _VALUES // values, _VALUES // classes)
        if device.type == "cpu":
            count = min(count, int(_ASCENT_WORK / (self.ascent_steps * max(1, work))))
        huge = _FEWEST_INVERTED * values > 2 * _VALUES
        return max(_FEWEST_INVERTED // (2 if huge else 1), count)

    def schedule_for(self, work: int, device: torch.device) -> tuple[int, int]:
        """Optimiser steps and batch, if a row's forward pass takes ``work`` multiply-adds."""
        if device.type != "cpu":
            return self.steps, self.batch
        batch = min(self.batch, max(_SMALLEST_BATCH, int(_STEP_WORK / max(1, work))))
        steps = min(self.steps, max(_FEWEST_STEPS, int(_FIT_WORK / (batch * max(1, work)))))
        return steps, batch


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has batch norms."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def has_norm(model: nn.Module) -> bool:
    """Whether a model has normalisation layers of any kind."""
    kinds = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return any(isinstance(m, kinds) for m in model.modules())


def layer_norms_alone(model: nn.Module) -> bool:
    """Whether a model has layer norms and no batch norms."""
    layer_norm = any(isinstance(m, nn.LayerNorm) for m in model.modules())
    return layer_norm and not has_batch_norm(model)


def check_depth(depth: str, objective: str) -> None:
    """Raises unless ``depth`` is known and goes with ``objective``.

    Raises:
        ArgumentError: there is no such depth, or depth="deep" with another objective than "masked".
    """
    check_choice("depth", depth, DEPTHS)
    if depth == "deep" and objective != "masked":
        raise ArgumentError(
            "objective",
            f"got {objective!r} with depth='deep', which has an objective of its own",
            "Leave objective out, or pass depth='output'.",
        )

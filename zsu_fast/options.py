"""The options of `unlearn`, validated and grouped by the stage that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import ArgumentError, check_choice, check_flag, check_int
from .models.multi_label import check_multi_label
from .models.outputs import OutputChoice, check_output
from .synthesis.ascent_settings import AscentSettings
from .synthesis.impressions import default_per_class
from .synthesis.space import SPACES, SpaceName
from .training.deep.settings import (
    FORGOTTEN_AS,
    DeepSettings,
    Depth,
    ForgottenAs,
    check_depth,
)
from .training.features import FeatureSettings
from .training.losses import ObjectiveSettings
from .training.trainer import LoopSettings

_ASCENT = (
    "confidence", "max_steps", "restarts", "step_size", "beta", "seed", "precision", "batch_norm",
)  # fmt: skip
_FEATURES = ("mixtures", "margin")
_LOOP = ("steps", "batch", "learning_rate", "early_stop", "loop")
_ALONE = (
    "tail", "depth", "space", "impressions_per_class", "retain_sample", "input_shape", "mean",
    "std", "output", "device", "cache", "inplace", "compact", "everywhere", "multi_label",
    "forgotten_as",
)  # fmt: skip
# What to do where the encoder of an `EmbeddingClassifier` can't forget.
ENCODER_REMEDY = (
    "Name an earlier module by tail=, raise steps, or forget fewer identities at once. There is no "
    "other level: the templates are beside the model, and whoever holds one recognises the person."
)
# What ranks may pass differently: it does not change the result.
PER_RANK = ("device", "cache", "inplace")


@dataclass
class Options:
    """The options of one call; `ZeroShotUnlearner` says what each of them means.

    The settings of the stages may be replaced before the stage runs.

    Attributes:
        given: every option that goes into the record, by name, as it was passed.
        depth_given: whether the caller chose ``depth``.
        ascent: of the synthesis.
        features: of the rows that the tail is trained on.
        objective: what the tail is trained on.
        loop: of the tail loop.
        deep: of depth="deep".

    Raises:
        ArgumentError: an option can't be used.
    """

    given: dict[str, Any]
    depth_given: bool
    tail: str | int
    depth: Depth
    space: SpaceName
    impressions_per_class: int | None
    retain_sample: int | None
    input_shape: Sequence[int] | None
    mean: float | Sequence[float] | None
    std: float | Sequence[float] | None
    output: OutputChoice | None
    device: str | torch.device | None
    cache: str | Path | None
    inplace: bool
    compact: bool
    everywhere: bool
    multi_label: bool | None
    forgotten_as: ForgottenAs | None
    ascent: AscentSettings
    features: FeatureSettings
    objective: ObjectiveSettings
    loop: LoopSettings
    deep: DeepSettings = field(default_factory=DeepSettings)

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> Options:
        """The options among ``keywords``, which must hold all of them."""

        def those(names: Sequence[str]) -> dict[str, Any]:
            return {name: keywords[name] for name in names}

        check_int("impressions_per_class", keywords["impressions_per_class"], optional=True)
        per_class = keywords["impressions_per_class"] or 1  # None: see `set_per_class`
        keywords = dict(keywords)
        depth_given = keywords["depth"] is not None
        if not depth_given:
            tail = keywords["tail"]
            last = tail == "last" if isinstance(tail, str) else type(tail) is int and tail == 1
            output = last or keywords["objective"] == "differential"
            keywords["depth"] = "output" if output else "deep"
        if keywords["space"] is None:
            keywords["space"] = "tail-input"
        grouped = (*_ALONE, *_ASCENT, *_FEATURES, *_LOOP, "objective", "weights")
        given = those(grouped)
        if callable(output := given["output"]):  # without an address, the same on each rank
            given["output"] = getattr(output, "__qualname__", type(output).__qualname__)
        return cls(
            given=given,
            depth_given=depth_given,
            **those(_ALONE),
            ascent=AscentSettings(per_class, **those(_ASCENT), loop=keywords["loop"]),
            features=FeatureSettings(**those(_FEATURES)),
            objective=ObjectiveSettings(keywords["objective"], keywords["weights"]),
            loop=LoopSettings(**those(_LOOP)),
        )

    def __post_init__(self) -> None:
        check_flag("inplace", self.inplace)
        check_flag("everywhere", self.everywhere)
        check_flag("compact", self.compact)
        check_multi_label(self.multi_label)
        if self.forgotten_as is not None:
            check_choice("forgotten_as", self.forgotten_as, FORGOTTEN_AS)
        if self.inplace and self.compact:
            raise ArgumentError(
                "inplace",
                "got True with compact=True, which gives the classifier new, smaller tensors",
                "Leave one of them out.",
            )
        check_choice("space", self.space, SPACES)
        check_depth(self.depth, self.objective.name)
        check_output(self.output)
        if isinstance(self.tail, bool) or not isinstance(self.tail, str | int):
            raise ArgumentError(
                "tail",
                f"got {self.tail!r}",
                "Pass 'auto', 'last', a module's name, or a whole number.",
            )

    def check_encoder(self, bias: bool) -> None:
        """Checks the options for an `EmbeddingClassifier`, whose encoder alone is trained.

        Args:
            bias: whether its templates have a bias: then they are the rows of a classifier, whose
                classes are compared with each other rather than with a threshold.

        Raises:
            ArgumentError: one of them asks for something else.
        """
        why, leave = "and the model is an encoder with templates", "Leave it out."
        self.forgotten_as = self.forgotten_as or ("redistribute" if bias else "stranger")
        if self.objective.name != "masked":
            raise ArgumentError("objective", f"got {self.objective.name!r}, {why}", leave)
        if self.depth != "deep":
            name = "depth" if self.depth_given else "tail"
            raise ArgumentError(
                name,
                f"got {getattr(self, name)!r}, {why}: they stay as they are beside it, and whoever "
                f"holds one would recognise the person as before",
                "Leave it out: the layers of the encoder are trained (depth='deep').",
            )
        for name in ("compact", "everywhere"):
            if getattr(self, name):
                raise ArgumentError(
                    name, f"got True, {why}",
                    "Leave it out, and delete the templates of the forgotten from the gallery.",
                )  # fmt: skip
        if self.multi_label:
            raise ArgumentError("multi_label", f"got True, {why}", leave)
        if self.output is not None:
            raise ArgumentError(
                "output", f"got {self.output!r}, {why}",
                "Leave it out: give EmbeddingClassifier an encoder that returns its embeddings.",
            )  # fmt: skip

    @property
    def seed(self) -> int:
        return self.ascent.seed

    def without_effect(
        self, impressions_given: bool, model: nn.Module, classes: int, forget: int
    ) -> list[str]:
        """Says which of the options that were given have no effect on a model of ``classes``,
        ``forget`` of them to forget, and why, in sentences.
        """
        default, inverted = AscentSettings(), self.depth == "deep" and self.space == "tail-input"
        ascent = [n for n in _ASCENT if n != "seed" and self.given[n] != getattr(default, n)]
        texts = []
        if impressions_given:
            names = [*ascent, *["impressions_per_class"] * (self.impressions_per_class is not None)]
            if names:
                texts.append(f"{', '.join(names)} had no effect: impressions were given.")
        elif inverted and ascent:
            texts.append(
                f"{', '.join(ascent)} had no effect: deep forgetting inverts rows at the split. "
                f"Pass space='input' to synthesise images too."
            )
        if self.objective.name == "masked" and self.objective.weights != ObjectiveSettings.weights:
            texts.append("weights had no effect: objective='masked' has none.")
        most = self.deep_settings(model, classes, classes, forget).most_steps
        steps = self.loop.steps
        if self.depth == "deep" and steps is not None and steps > most:
            texts.append(
                f"steps={steps} only holds for the last layer: the layers ahead of it are trained "
                f"for at most {most} steps."
            )
        return texts

    def deep_settings(
        self, model: nn.Module, classes: int, active: int, forget: int
    ) -> DeepSettings:
        """The settings of deep forgetting for a model of ``classes``, ``active`` of them with rows
        and ``forget`` to forget; with the impressions per class if they are given.
        """
        per_class, stranger = self.impressions_per_class, self.forgotten_as == "stranger"
        multi_label = self.objective.multi_label
        settings = self.deep.for_model(model, classes, forget, multi_label, stranger)
        if per_class is None:
            return settings
        return replace(settings, inverted=per_class * active, inverted_per_class=0)

    def set_multi_label(self, multi_label: bool) -> None:
        """Sets what each stage takes the model's classes for."""
        self.ascent = replace(self.ascent, multi_label=multi_label)
        self.objective = replace(self.objective, multi_label=multi_label)

    def set_per_class(self, classes: int) -> None:
        """Sets the impressions per class, unless given, to what suits that many classes."""
        if self.impressions_per_class is None:
            self.ascent = replace(self.ascent, per_class=default_per_class(classes))


def paper_preset() -> dict[str, Any]:
    """Returns options that follow the paper: ``unlearn(model, forget, **paper_preset())``.

    Plain logit ascent without a confidence target; AdamW with a rate of 1e-3; w_f 0.9, w_r 0.1;
    100 steps without early stopping. The impressions saturate, so their cross-entropy gradients
    vanish: often nothing is forgotten, or everything is. Use it for comparison only.
    """
    return {
        "objective": "differential",
        "confidence": None,
        "restarts": 0,
        "max_steps": 200,
        "step_size": 0.02,
        "learning_rate": 1e-3,
        "weights": (0.9, 0.1),
        "steps": 100,
        "mixtures": 0,
        "early_stop": False,
        "tail": "last",
        "depth": "output",
        "space": "input",
    }

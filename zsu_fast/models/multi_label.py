"""Multi-label classifiers: one sigmoid per class, so that an image may have any number of classes.

Whether a model is one can't be seen in its weights. A transformers config says so, and a model that
ends in a sigmoid shows it; in any other case the user has to (``multi_label=True``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, ModelError, check_flag
from .parameters import unwrap
from .wrapper import LogitsModel, pick_logits

# A class is predicted from this probability on, which is a logit of 0.
THRESHOLD = 0.5
_PROBLEM_TYPE = "multi_label_classification"  # in a transformers config
# Probabilities that round to 0 or 1 have no finite logit.
_LEAST, _MOST = 1e-30, 1 - 2**-24
# What may follow a sigmoid without changing its values.
_NEUTRAL = ("View", "UnsafeView", "Reshape", "Clone", "Alias", "Squeeze", "Unsqueeze", "ToCopy")


def check_multi_label(multi_label: Any) -> None:
    """Raises unless ``multi_label`` is True, False or None.

    Raises:
        ArgumentError: it is something else.
    """
    if multi_label is not None:
        check_flag("multi_label", multi_label)


def stated_multi_label(model: nn.Module) -> bool:
    """Whether the transformers config of ``model``, or of a module in it, says multi-label.

    Raises:
        ModelError: it says that the outputs are a regression.
    """
    configs = (getattr(module, "config", None) for module in unwrap(model).modules())
    stated = {getattr(config, "problem_type", None) for config in configs if config is not None}
    if "regression" in stated:
        raise ModelError(
            "its config says problem_type='regression': its outputs are no classes",
            "Pass a classifier, or correct model.config.problem_type.",
        )
    return _PROBLEM_TYPE in stated


def find_multi_label(
    model: nn.Module, work: LogitsModel, images: Tensor, multi_label: bool | None
) -> tuple[bool, list[str]]:
    """Whether a model is multi-label, and what was assumed, in sentences.

    Args:
        model: the user's.
        work: its working copy, with the sigmoid at its end if it has one.
        images: two or more that it takes, [N, ...].
        multi_label: what the user says; None to find out.

    Raises:
        ArgumentError: ``multi_label`` is not True, False or None.
        ModelError: the model's config says that it is no classifier.
    """
    check_multi_label(multi_label)
    stated = stated_multi_label(model)
    if multi_label is not None:
        if multi_label or not stated:
            return multi_label, []
        ignored = f"multi_label=False was passed although the config says {_PROBLEM_TYPE!r}"
        return False, [f"{ignored}: the classes are taken to exclude each other."]
    if stated or not ends_in_sigmoid(work, images):
        return stated, []
    return True, [
        "the model ends in a sigmoid, so it is taken for a multi-label classifier. Pass "
        "multi_label=False if its classes exclude each other."
    ]


def ahead_of_sigmoid(work: LogitsModel, images: Tensor) -> LogitsModel:
    """The model that returns the logits of ``work``: itself, unless it ends in a sigmoid."""
    return BeforeSigmoid(work.module).eval() if ends_in_sigmoid(work, images) else work


def ends_in_sigmoid(model: LogitsModel, images: Tensor) -> bool:
    """Whether the outputs of ``model`` come out of a sigmoid: a module or a function."""
    try:
        with torch.enable_grad():
            node: Any = model(images).grad_fn
    except Exception:  # noqa: BLE001  `count_classes` says what is wrong
        return False
    while node is not None and type(node).__name__.startswith(_NEUTRAL):
        node = node.next_functions[0][0]
    return type(node).__name__ == "SigmoidBackward0"


class BeforeSigmoid(LogitsModel):
    """The logits of a classifier that ends in a sigmoid, from its probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        probability = pick_logits(self.module(x)).clamp(_LEAST, _MOST)
        logits: Tensor = probability.log() - (-probability).log1p()
        return logits


def predicted(logits: Tensor) -> Tensor:
    """Which classes have a probability of at least one half, bool of the shape of ``logits``."""
    return logits >= 0


def log_probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """Log-probabilities of the classes, [N, C]: of each by itself, or of their softmax."""
    return F.logsigmoid(logits) if multi_label else logits.log_softmax(1)


def multi_hot(labels: Any, classes: int, argument: str) -> Tensor:
    """Labels of several classes per image -> bool [N, C].

    Args:
        labels: a tensor [N, C] of 0 and 1, of any dtype; or for each image the list of its
            classes, which may be empty.
        classes: C.
        argument: its name, for error messages.

    Raises:
        ArgumentError: they are something else.
    """
    if isinstance(labels, Tensor):
        if labels.ndim != 2 or labels.shape[1] != classes:
            raise ArgumentError(
                argument,
                f"its labels have the shape {tuple(labels.shape)}, the model has {classes} logits",
                f"Pass labels [N, {classes}] of 0 and 1.",
            )
        if not bool(((labels == 0) | (labels == 1)).all()):
            raise ArgumentError(
                argument, "its labels hold other values than 0 and 1", "Round them first."
            )
        return labels.cpu().bool()
    rows = torch.zeros(len(labels), classes, dtype=torch.bool)
    for row, indices in zip(rows, labels, strict=True):
        index = torch.as_tensor(indices).flatten()
        wrong = index.is_floating_point() or index.dtype == torch.bool
        if len(index) and (wrong or not 0 <= int(index.min()) <= int(index.max()) < classes):
            raise ArgumentError(
                argument,
                f"the labels of an image are {index.tolist()}, the model has {classes} logits",
                f"Pass class indices from 0 to {classes - 1}.",
            )
        row[index.long()] = True
    return rows

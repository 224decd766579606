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
from .probe import choose_item
from .wrapper import LogitsModel

# A class is predicted from this probability on, which is a logit of 0.
THRESHOLD = 0.5
_PROBLEM_TYPE = "multi_label_classification"  # in a transformers config
# What may follow a sigmoid and hardly change its values.
_NEUTRAL = (
    "View", "UnsafeView", "Reshape", "Clone", "Alias", "Squeeze", "Unsqueeze", "ToCopy", "Clamp",
)  # fmt: skip


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
        work: its working copy, before `probe` leaves out the sigmoid at its end.
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
        "the model ends in a sigmoid, so it is taken for a multi-label classifier and unlearned "
        "ahead of the sigmoid. Pass multi_label=False if its classes exclude each other."
    ]


def ends_in_sigmoid(model: LogitsModel, images: Tensor) -> bool:
    """Whether the outputs of ``model`` come out of a sigmoid: a module or a function."""
    try:
        choose_item(model, images)
        with torch.enable_grad():
            node: Any = model(images).grad_fn
    except Exception:  # noqa: BLE001  `probe` says what is wrong
        return False
    while node is not None and type(node).__name__.startswith(_NEUTRAL):
        node = node.next_functions[0][0]
    return type(node).__name__ == "SigmoidBackward0"


def predicted(logits: Tensor) -> Tensor:
    """Which classes have a probability of at least one half, bool of the shape of ``logits``."""
    return logits >= 0


def same_decisions(logits: Tensor, original: Tensor, counted: Tensor) -> Tensor:
    """Share of the decisions on classes that are the original's, float [N].

    Those for and against a class weigh the same, whatever their number.

    Args:
        logits, original: [N, C].
        counted: bool [C]: the classes that count.
    """
    now, before = (predicted(x) & counted for x in (logits, original))
    absent = ~before & counted
    kept = (now & before).sum(1) / before.sum(1).clamp(min=1)
    left_out = (absent & ~now).sum(1) / absent.sum(1).clamp(min=1)
    both = before.any(1) & absent.any(1)
    return torch.where(both, (kept + left_out) / 2, torch.where(before.any(1), kept, left_out))


def log_probabilities(logits: Tensor, multi_label: bool) -> Tensor:
    """Log-probabilities of the classes, [N, C]: of each by itself, or of their softmax."""
    return F.logsigmoid(logits) if multi_label else logits.log_softmax(1)


def has_several(labels: Any) -> bool:
    """Whether ``labels`` may hold any number of classes per image: [n, C], or a list of lists."""
    if hasattr(labels, "ndim"):
        return bool(labels.ndim == 2)
    first = next(iter(labels), None) if isinstance(labels, list | tuple) else None
    return isinstance(first, list | tuple | set) or getattr(first, "ndim", 0) > 0


def multi_hot(labels: Any, classes: int, argument: str) -> Tensor:
    """Labels of several classes per image -> bool [N, C].

    Args:
        labels: a tensor or array [N, C] of 0 and 1, of any dtype, or a list of its rows; or for
            each image the list of its classes, which may be empty.
        classes: C.
        argument: its name, for error messages.

    Raises:
        ArgumentError: they are something else.
    """
    if not has_several(labels):
        raise ArgumentError(
            argument,
            "its labels are one class per image, and the model is multi-label",
            f"Pass labels [N, {classes}] of 0 and 1.",
        )
    if hasattr(labels, "ndim"):
        return _check_hot(torch.as_tensor(labels), classes, argument)
    try:
        rows = [torch.as_tensor(list(row) if isinstance(row, set) else row) for row in labels]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            argument, f"its labels can't be read ({error})", "Pass class indices for each image."
        ) from error
    if all(row.shape == (classes,) and _is_hot(row) for row in rows):
        listed = all(isinstance(row, list | tuple) for row in labels)
        if listed and not any(r.is_floating_point() or len(r.unique()) < len(r) for r in rows):
            raise ArgumentError(
                argument,
                f"its labels {rows[0].tolist()} may be class indices, or 0 and 1 for each class",
                f"Pass a tensor [N, {classes}] of 0 and 1.",
            )
        return torch.stack(rows).cpu().bool()
    hot = torch.zeros(len(rows), classes, dtype=torch.bool)
    for target, row in zip(hot, rows, strict=True):
        index = row.flatten()
        wrong = index.is_floating_point() or index.dtype == torch.bool
        if len(index) and (wrong or not 0 <= int(index.min()) <= int(index.max()) < classes):
            raise ArgumentError(
                argument,
                f"the labels of an image are {index.tolist()}, the model has {classes} logits",
                f"Pass class indices from 0 to {classes - 1}.",
            )
        target[index.long()] = True
    return hot


def _is_hot(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all())


def _check_hot(labels: Tensor, classes: int, argument: str) -> Tensor:
    if labels.shape[1] != classes:
        raise ArgumentError(
            argument,
            f"its labels have the shape {tuple(labels.shape)}, the model has {classes} logits",
            f"Pass labels [N, {classes}] of 0 and 1.",
        )
    if not _is_hot(labels):
        raise ArgumentError(
            argument, "its labels hold other values than 0 and 1", "Round them first."
        )
    return labels.cpu().bool()

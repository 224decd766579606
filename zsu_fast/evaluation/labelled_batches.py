"""Batches of labelled images, checked: what `evaluate` and `audit` accept as data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError


def labelled_batches(
    data: Any, argument: str, batch: int, multi_label: bool = False
) -> Iterator[tuple[Tensor, Any]]:
    """Yields (images, labels) batches: images as given, labels as int64 [n] on the CPU.

    Empty batches are left out.

    Args:
        data: a (images [N, ...], labels int [N]) pair of tensors, or a DataLoader or another
            iterable of such pairs.
        argument: the name of the argument, for error messages.
        batch: the batch size if ``data`` is a pair of tensors.
        multi_label: also yield labels [n, C], and lists of the classes of each image, as they are.

    Raises:
        ArgumentError: ``data`` is of another type or holds no image, or labels are not one class
            index per image.
    """
    source: Iterable[Any] = data
    if multi_label and _is_pair_with_lists(data):
        images, lists = data
        _check_count(images, lists, argument)
        parts = (lists[at : at + batch] for at in range(0, len(lists), batch))
        source = zip(images.split(batch), parts, strict=True)
    elif isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        images, labels = data
        _check_count(images, labels, argument)
        source = zip(images.split(batch), labels.split(batch), strict=True)
    elif isinstance(data, str | bytes | dict) or not (
        isinstance(data, Iterable) or hasattr(data, "__getitem__")
    ):
        raise ArgumentError(
            argument, f"got a {type(data).__name__}", "Pass (images, labels) or a DataLoader."
        )
    empty = True
    for images, labels in source:
        if multi_label and has_several(labels):
            _check_count(images, labels, argument)
            if len(labels):
                empty = False
                yield images, labels
            continue
        labels = torch.as_tensor(labels).cpu()
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ArgumentError(
                argument,
                f"its labels are {labels.dtype} of shape {tuple(labels.shape)}",
                "Pass one class index, an int, for each image."
                if labels.ndim != 2
                else "Pass one class index, an int, for each image, or multi_label=True.",
            )
        _check_count(images, labels, argument)
        if len(labels):
            empty = False
            yield images, labels.long()
    if empty:
        raise ArgumentError(
            argument, "there is no image in it", "Pass at least one labelled image."
        )


def check_label_range(labels: Tensor, classes: int, argument: str) -> None:
    """Checks that each of ``labels``, int64 [n] with n > 0, is the index of a logit.

    Raises:
        ArgumentError: a label is below 0, or ``classes`` or more.
    """
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < classes:
        raise ArgumentError(
            argument,
            f"labels run from {low} to {high}, the model has {classes} logits",
            f"Number the classes from 0 to {classes - 1}, as in the model's training.",
        )


def has_several(labels: Any) -> bool:
    """Whether ``labels`` may hold any number of classes per image: [n, C], or a list of lists."""
    if isinstance(labels, Tensor):
        return labels.ndim == 2
    first = next(iter(labels), None) if isinstance(labels, list | tuple) else None
    return isinstance(first, list | tuple | set) or getattr(first, "ndim", 0) > 0


def _is_pair_with_lists(data: Any) -> bool:
    pair = isinstance(data, tuple | list) and len(data) == 2
    return pair and isinstance(data[0], Tensor) and isinstance(data[1], list | tuple)


def _check_count(images: Tensor, labels: Any, argument: str) -> None:
    if len(images) != len(labels):
        raise ArgumentError(
            argument,
            f"there are {len(images)} images and {len(labels)} labels",
            "Pass one label for each image.",
        )
